"""Read the tars and tables with tools that do not know this project, as docs/format.md shows.

webdataset, tarfile and DALI are tested in test_dataset.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import duckdb
import polars
import pytest

from schemas import Sample, ShardDataset, write_dataset

PAGE = Path(__file__).resolve().parents[2] / "docs" / "format.md"
COUNT = 25


@pytest.fixture
def dataset(
    make_sample: Callable[..., Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ShardDataset:
    """Write a dataset to `out/photos` in the current folder, where the page's lines look for it."""
    monkeypatch.chdir(tmp_path)
    samples = [make_sample(index) for index in range(COUNT)]
    return write_dataset(
        "out/photos", samples, name="test", classes=["a", "b", "c"], shard_samples=10
    )


def run_line(package: str) -> object:
    """Run the page's line for a package; return the value of its last expression."""
    [line] = re.findall(rf"^\| {package} \| `([^`]+)` \|", PAGE.read_text(), re.M)
    *statements, last = line.split("; ")
    names: dict[str, object] = {}
    exec("\n".join(statements), names)
    return eval(last, names)


def test_hugging_face_datasets_reads_the_tars(
    dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    seen = list(run_line("Hugging Face datasets"))
    assert [row["__key__"] for row in seen] == dataset.samples["key"].to_pylist()
    expected = list(dataset)
    for row, sample in zip(seen, expected, strict=True):
        assert int(row["cls"]) == sample.label
        assert row["jpg"].size == (sample.width, sample.height)
        assert row["saliency.png"].size == (28, 28)


def test_polars_reads_the_tables(dataset: ShardDataset) -> None:
    table = run_line("Polars")
    assert table["key"].to_list() == dataset.samples["key"].to_pylist()
    parts = polars.read_parquet("out/photos/shards/*.parquet")
    assert parts.equals(table)  # the shards' own tables have the same rows
    assert polars.DataFrame(dataset.samples).equals(table)


def test_duckdb_reads_the_tables(dataset: ShardDataset) -> None:
    assert sorted(run_line("DuckDB")) == [(0, 9), (1, 8), (2, 8)]
    samples = dataset.samples
    assert duckdb.sql("select count(*) from samples").fetchall() == [(COUNT,)]
    assert len(samples) == COUNT


def test_pyarrow_reads_the_tables(dataset: ShardDataset) -> None:
    assert run_line("PyArrow").to_pylist() == dataset.samples.to_pylist()
