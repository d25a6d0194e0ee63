"""Test that the usual ways do what they are compared for, and run the command end to end."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench import usual
from bench.loader import FILLS, Options, choose_baselines, make_ways
from pipeline import RECIPES
from schemas import UserError, write_dataset
from tests.pipeline.conftest import picture, sample_of


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["blur", "mean"])
def test_loops_mask_as_many_cells_as_the_method_says(name: str, hard: bool) -> None:
    recipe = dataclasses.replace(
        RECIPES[name], query_ratio=(0.2, 0.2), hard_negative_ratio=(0.5, 0.5), crop_size=56
    )
    image = torch.rand(6, 3, 56, 56) + 1  # nowhere 0, which is the fill
    maps = np.random.default_rng(0).random((6, 7, 7))
    blurred = torch.zeros_like(image) if name == "blur" else None
    masked = usual.mask_by_loops(image, maps, recipe, hard, blurred)
    changed = (masked != image).unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).all(4)
    for index, one in enumerate(maps):
        front = one >= one.mean() - 0.6 * one.std()
        of_front = round(0.5 * front.sum()) if hard else round(0.2 * front.sum())
        of_back = 0 if hard else math.floor(0.2 * 49) - of_front
        for channel in changed[index].numpy():
            assert (channel & front).sum() == of_front
            assert (channel & ~front).sum() == of_back
    expected = torch.zeros(()) if name == "blur" else image.mean((2, 3), keepdim=True)
    kept = masked == image
    assert torch.allclose(masked[~kept], expected.expand_as(image)[~kept])


def test_ways_are_compared_with_their_own_fill() -> None:
    names = [f"usual {fill}, no saliency forward" for fill in FILLS]
    found = choose_baselines([*names, "ours mean", "ours none", "webdataset hp"])
    assert found["ours mean"] == "usual mean, no saliency forward"
    assert found["webdataset hp"] == "usual hp, no saliency forward"
    assert "ours none" not in found
    reading = ["read only, batch 32", "read only, batch 32, DALI's reader"]
    assert choose_baselines(reading) == {reading[0]: reading[1]}


def test_a_batch_that_the_images_do_not_fill_is_refused(tmp_path: Path) -> None:
    """Repeating a DataLoader without batches never ends."""
    samples = [sample_of(index, picture(index)) for index in range(3)]
    write_dataset(tmp_path / "d", samples, name="t", classes=["a"] * 11)
    (tmp_path / "images").mkdir()
    options = Options(data=str(tmp_path / "d"), batch_size=4, workers=0, rows=("usual",))
    with pytest.raises(UserError, match="--batch-size 4: the dataset has only 3 images"):
        make_ways(options, tmp_path / "images")


@pytest.mark.slow
def test_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [sample_of(index, picture(index)) for index in range(12)]
    write_dataset(tmp_path / "d", samples, name="t", classes=["a"] * 11, shard_samples=6)
    out = tmp_path / "rates.json"
    arguments = ["--data", str(tmp_path / "d"), "--out", str(out), "--crop-size", "56"]
    arguments += ["--batch-size", "2", "--batches", "1", "--repeats", "1", "--workers", "1"]
    monkeypatch.setattr("sys.argv", ["bench", "loader", *arguments])
    monkeypatch.setattr("bench.table.wait_until_quiet", lambda: None)  # other tests run now
    command.main()
    table = capsys.readouterr().out
    rates = json.loads(out.read_text())["images_per_second"]["Loader"]
    ours = {f"ours {name}" for name in RECIPES if not name.endswith("-released")}
    usual_rows = {f"usual {fill}, saliency by ResNet-50" for fill in FILLS}
    assert ours | usual_rows <= set(rates)
    assert {f"webdataset {fill}" for fill in FILLS} <= set(rates)
    assert {f"read only, batch {size}" for size in (2, 12)} <= set(rates)  # 12 is all there is
    assert {"read only, batch 2, DALI's reader", "decode only"} <= set(rates)
    assert all(name in table for name in rates)
    assert all(rate > 0 for values in rates.values() for rate in values)
