"""Tests of `verify` on a Ray cluster: it finds the same problems as on one machine."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from precompute import verify_job
from precompute.verify_job import check_rows
from schemas import Sample, ShardDataset, UserError, write_dataset


@pytest.fixture
def dataset(make_sample: Callable[..., Sample], tmp_path: Path) -> ShardDataset:
    """Write twelve shards, then flip a bit in one of them and remove the index of another."""
    samples = [make_sample(index) for index in range(24)]
    dataset = write_dataset(
        tmp_path / "set", samples, name="test", classes=["a", "b", "c"], shard_samples=2
    )
    tar = tmp_path / "set" / "shards" / "000009.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(content)
    (tmp_path / "set" / "shards" / "000003.idx").unlink()
    return dataset


def test_some_shards_are_checked_as_all_are(dataset: ShardDataset) -> None:
    ranges = dataset.samples.ranges()
    found = check_rows(dataset.url, [(row, ranges[row.shard]) for row in dataset.shards[2:10]])
    assert [row for row, _ in found] == dataset.shards[2:10]
    problems = [problem for _, problems in found for problem in problems]
    assert problems == dataset.verify().problems
    assert len(problems) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_the_command_reports_goes_on_and_draws(
    dataset: ShardDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = tmp_path / "record.jsonl"

    def verify(*options: object) -> int:
        monkeypatch.setattr(sys, "argv", ["verify", dataset.url, *map(str, options)])
        return verify_job.main()

    expected = str(dataset.verify())
    assert verify("--record", record) == 1
    assert capsys.readouterr().out == f"{expected}\n"
    assert verify("--record", record) == 1
    assert "2 problems: 4 samples, 2 shards, 10 more by earlier runs" in capsys.readouterr().out
    assert verify("--shards", 1, "--seed", 0) == 0
    assert "1 of 12 shards" in capsys.readouterr().out
    with pytest.raises(UserError, match="--shards is 0"):
        verify("--shards", 0)
