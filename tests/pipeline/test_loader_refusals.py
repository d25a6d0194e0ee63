"""The loader refuses unsuitable settings and data, and names the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_loader import take
from pipeline import MaskedViews
from schemas import ShardDataset, UserError
from tests.pipeline.conftest import BATCH, small, views_of


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("seed", {"seed": 1}),
        ("batch_size was 16, is 14", {"batch_size": 7}),
        ("shuffle_shards was 16, is 8", {"shuffle_shards": 8}),
        ("streams was 1, is 2", {"streams": 2}),
        ("recipe", {"recipe": small("hp", query_ratio=(0.1, 0.2))}),
        ("batch_size was 16, is 24", {"world_size": 3}),
    ],
)
def test_a_state_of_other_settings_is_refused(
    dataset: ShardDataset, name: str, changes: dict[str, Any]
) -> None:
    settings = {"recipe": small("hp"), "batch_size": BATCH, "device": "cpu", "world_size": 2}
    views = MaskedViews(dataset.url, **settings)
    take(views, 1)
    other = MaskedViews(dataset.url, **{**settings, **changes})
    with pytest.raises(
        UserError, match=f"cannot resume.* under other settings: .*{name}"
    ) as refusal:
        other.load_state_dict(views.state_dict())
    if name == "recipe":
        assert "recipe.query_ratio was [0.05, 0.25], is [0.1, 0.2]" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_state_of_another_dataset_or_version_is_refused(
    dataset: ShardDataset, own_dataset: ShardDataset
) -> None:
    state = views_of(dataset, batch_size=3).state_dict()
    with pytest.raises(UserError, match="dataset"):
        views_of(own_dataset, batch_size=3).load_state_dict(state)
    with pytest.raises(UserError, match="version 3, this code reads up to 2"):
        views_of(dataset, batch_size=3).load_state_dict({**state, "version": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 10**6}, "epoch 0, step 1000000: an epoch has steps 0 to"),
        ({"step": -1}, "epoch 0, step -1"),
        ({"epoch": -1}, "epoch -1, step 0"),
    ],
)
def test_a_state_of_no_step_is_refused(
    dataset: ShardDataset, changes: dict[str, int], message: str
) -> None:
    views = views_of(dataset, batch_size=3)
    state = views.state_dict()
    with pytest.raises(UserError, match=message):
        views.load_state_dict({**state, **changes})
    assert views.state_dict() == state
    with pytest.raises(UserError, match="not a state of a loader: it has no fingerprint, step"):
        views.load_state_dict({"version": 2, "epoch": 0})


@pytest.mark.parametrize(
    "damage",
    [
        "stale",
        "short",
        "version",
        "offset",
        "number",
        "missing",
        "tar",
        "empty",
        "parquet",
        "table",
    ],
)
def test_a_wrong_index_is_refused_by_its_shard(own_dataset: ShardDataset, damage: str) -> None:
    index, tar = Path(own_dataset.index_urls[1]), Path(own_dataset.shard_urls[1])
    lines = index.read_text().splitlines(keepends=True)
    match damage:
        case "stale":  # the index of a shard with fewer samples
            index.write_text("".join(["v1.2 2\n", *lines[1:3]]))
        case "short":
            index.write_text("".join(lines[:3]))
        case "version":
            index.write_text("".join(["v1.1 3\n", *lines[1:]]))
        case "offset":
            words = lines[-1].split()
            words[-7] = str(tar.stat().st_size)  # offset of the map
            index.write_text("".join([*lines[:-1], " ".join(words) + "\n"]))
        case "number":
            words = lines[-1].split()
            words[-7] = "many"
            index.write_text("".join([*lines[:-1], " ".join(words) + "\n"]))
        case "missing":
            index.unlink()
        case "parquet":  # as from another tool, which writes no table
            index.with_suffix(".parquet").unlink()
        case "table":
            index.with_suffix(".parquet").write_bytes(b"no parquet")
        case "tar":
            tar.write_bytes(tar.read_bytes()[:-512])
        case "empty":
            index.write_text("")
    with pytest.raises(UserError, match=r"shard 1: .*saliency-shards verify") as refusal:
        list(views_of(own_dataset, batch_size=2))
    assert "\n" not in str(refusal.value)


def test_too_few_samples_are_refused_with_the_numbers(dataset: ShardDataset) -> None:
    with pytest.raises(UserError, match="45 samples are too few for 3 ranks x batch 16"):
        views_of(dataset, world_size=3, batch_size=16)


def test_a_missing_gpu_is_refused(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r'PyTorch sees no GPU here: .*; choose device "cpu" \('):
        views_of(dataset, device="cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "choose cpu or cuda"),
        ({"device": "meta"}, "choose cpu or cuda"),
        ({"report": ("mask",)}, "unknown extra 'mask'"),
        ({"rank": 1}, "ranks are 0 .. world size - 1"),
        ({"batch_size": 0}, "at least 1 sample"),
        ({"decode_on": "tpu"}, "decode_on 'tpu': choose gpu or cpu"),
    ],
)
def test_other_mistakes_are_refused(
    dataset: ShardDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        views_of(dataset, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is in 0"),
        ({"shuffle_shards": 0}, "shuffle_shards 0"),
        ({"streams": 4}, "3 shards are too few for 4 streams; choose fewer streams"),
        ({"streams": 3}, "16 samples cannot be shared equally by 3 streams"),
        ({"world_size": 8, "batch_size": 3, "streams": 3}, "8 ranks cannot share 3 streams"),
    ],
)
def test_orders_that_make_no_sense_are_refused(
    dataset: ShardDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        views_of(dataset, **{"batch_size": 16, **options})
