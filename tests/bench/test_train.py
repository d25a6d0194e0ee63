"""Run the training benchmark end to end, and check its ratios."""

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import train
from bench.table import Row
from schemas import UserError, write_dataset
from tests.pipeline.conftest import picture, sample_of


@pytest.mark.slow
def test_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.table.wait_until_quiet", lambda: None)  # other tests run now
    samples = [sample_of(index, picture(index)) for index in range(12)]
    write_dataset(tmp_path / "d", samples, name="t", classes=["a"] * 11, shard_samples=6)
    out = tmp_path / "rates.json"
    rows = (train.ALONE, train.JOB, train.ONLINE, train.RELEASED, train.ADIOS_S)
    arguments = [
        "--data", str(tmp_path / "d"), "--out", str(out), "--encoder", "resnet18",
        "--crop-size", "56", "--batch-size", "4", "--queue", "16", "--steps", "1",
        "--repeats", "1", "--workers", "1", "--device", "cpu", "--rows", *rows,
    ]  # fmt: skip
    command.bench_train(arguments)
    told = capsys.readouterr().out
    assert all(f"| {name} |" in told for name in rows)
    assert "of the time waiting for data" in told
    written = json.loads(out.read_text())
    assert set(written["images_per_second"]["Training"]) == set(rows)
    assert written["machine"]["date"]


def test_a_row_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """It was left out without a word; a table of it alone was empty."""
    with pytest.raises(UserError, match="unknown row 'step': there are the released way"):
        train.build_trainers(train.Options(data="unused", rows=(train.ALONE, "step")), tmp_path)


def test_ratios_are_of_the_rows_that_they_name() -> None:
    rows = [Row(train.ALONE, [10.0]), Row(train.JOB, [9.0]), Row(train.SUPERVISED, [20.0])]
    found = train.summarize(rows, {train.JOB: 0.125})
    assert found[0].endswith(": 0.900")
    # A supervised step of 3 forwards at 20 images/s allows 12 pairs/s of 5 forwards.
    assert found[1].endswith(f": {10 / 12:.3f}")
    assert found[2] == "the whole job: 12.5% of the time waiting for data"
