"""Test that the table of samples is read and written in parts, in bounded memory, unchanged."""

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from schemas import (
    FormatError,
    Reject,
    Sample,
    ShardDataset,
    UserError,
    table_writer,
    write_dataset,
    writer,
)
from schemas import sample_table as sample_table_module
from schemas.shard import read_marker
from schemas.storage import Store
from schemas.table_writer import KeyHashes, TableWriter
from schemas.tables import (
    PARQUET_OPTIONS,
    REJECTS_SCHEMA,
    SAMPLES,
    SAMPLES_SCHEMA,
    build_table,
    to_parquet,
)

Make = Callable[..., Sample]
COUNT = 25


def write(url: str | Path, make_sample: Make) -> ShardDataset:
    samples = [make_sample(index) for index in range(COUNT)]
    return write_dataset(url, samples, name="test", classes=["a", "b", "c"], shard_samples=10)


@pytest.fixture(params=["path", "memory", "row groups", "no samples.parquet"])
def dataset(
    request: pytest.FixtureRequest,
    make_sample: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ShardDataset:
    if request.param == "row groups":
        monkeypatch.setattr(table_writer, "ROW_GROUP", 7)
    if request.param == "no samples.parquet":
        for module in (writer, sample_table_module):
            monkeypatch.setattr(module, "MERGED_SAMPLES", 12)
    url = f"memory://table/{tmp_path.name}" if request.param == "memory" else str(tmp_path / "set")
    dataset = write(url, make_sample)
    assert dataset.store.exists(SAMPLES) == (request.param != "no samples.parquet")
    return dataset


def whole_table(dataset: ShardDataset) -> pa.Table:
    """Return the rows from the markers alone, without the code under test."""
    shards = range(len(dataset.shards))
    return pa.concat_tables([read_marker(dataset.store, shard).samples for shard in shards])


def test_every_way_to_read_gives_the_same_rows(dataset: ShardDataset) -> None:
    expected, samples = whole_table(dataset), dataset.samples
    assert len(samples) == samples.num_rows == COUNT
    for name in SAMPLES_SCHEMA.names:
        assert samples[name].to_pylist() == expected[name].to_pylist()
    assert samples.to_table().equals(expected)
    assert pa.concat_tables(samples.batches()).equals(expected)
    for start, stop in [(0, COUNT), (8, 22), (0, 1), (24, 25), (10, 10), (20, 99)]:
        assert (
            samples.rows(start, stop).to_pylist() == expected.slice(start, stop - start).to_pylist()
        )
    assert samples.ranges() == {0: (0, 10), 1: (10, 20), 2: (20, 25)}
    assert samples.to_table(["label", "key"]).column_names == ["label", "key"]


def test_operations_of_an_arrow_table_work(dataset: ShardDataset) -> None:
    expected, samples = whole_table(dataset), dataset.samples
    assert samples.schema.equals(SAMPLES_SCHEMA)
    assert samples.to_pylist() == expected.to_pylist()
    assert samples.slice(5)["key"].to_pylist() == expected.slice(5)["key"].to_pylist()
    assert samples.filter(pc.field("label") == 1).num_rows == 8
    assert pa.table(samples).equals(expected)  # the interface that Polars and DuckDB use
    with pytest.raises(AttributeError):
        _ = samples.no_such_method


def test_the_dataset_is_complete_however_its_table_is_stored(dataset: ShardDataset) -> None:
    assert dataset.verify().clean
    assert [sample.key for sample in dataset] == whole_table(dataset)["key"].to_pylist()
    assert dataset.unlabeled == 0


def test_it_can_be_sent_to_another_process(dataset: ShardDataset) -> None:
    expected = dataset.samples.to_table()
    again = pickle.loads(pickle.dumps(dataset))
    assert again.samples.to_table().equals(expected)
    assert pickle.loads(pickle.dumps(dataset.samples)).to_table().equals(expected)


def test_only_the_requested_columns_are_read(
    make_sample: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path, make_sample)
    content = (tmp_path / SAMPLES).read_bytes()
    column = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(3)
    assert column.path_in_schema == "label"
    samples, read = dataset.samples, []
    plain = Store.read

    def spy(store: Store, name: str, *ends: int) -> bytes:
        read.append((name, *ends))
        return plain(store, name, *ends)

    monkeypatch.setattr(Store, "read", spy)
    assert len(samples["label"]) == COUNT
    start = column.dictionary_page_offset or column.data_page_offset
    assert read == [(SAMPLES, start, start + column.total_compressed_size)]
    assert len(samples["label"]) == COUNT
    assert len(read) == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "other rows"])
def test_damage_is_a_format_error(damage: str, make_sample: Make, tmp_path: Path) -> None:
    dataset = write(tmp_path, make_sample)
    path = tmp_path / SAMPLES
    if damage == "missing":
        path.unlink()
        with pytest.raises(FormatError, match=r"samples\.parquet: missing"):
            _ = dataset.samples
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(FormatError, match="not a readable parquet file"):
            _ = dataset.samples
    else:
        table = pq.read_table(path)
        pq.write_table(pa.concat_tables([table.slice(5), table.slice(0, 5)]), path)
        with pytest.raises(FormatError, match="the rows of shard 0 lie apart"):
            dataset.samples.ranges()
        found = dataset.verify().problems
        assert any("lie apart" in problem.what for problem in found)


def test_a_shards_table_of_another_length_is_named(
    make_sample: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (writer, sample_table_module):
        monkeypatch.setattr(module, "MERGED_SAMPLES", 12)
    dataset = write(tmp_path, make_sample)
    marker = tmp_path / "shards" / "000001.parquet"
    pq.write_table(pq.read_table(marker).slice(1), marker)
    with pytest.raises(FormatError, match=r"000001\.parquet: 9 rows, .* says 10"):
        dataset.samples.to_table()
    marker.unlink()
    with pytest.raises(FormatError, match=r"000001\.parquet: missing"):
        dataset.samples.to_table()


def test_reading_a_part_starts_no_thread(make_sample: Make, tmp_path: Path) -> None:
    """Check for threads: Python aborts if an Arrow thread holds a Python object at exit."""
    write(tmp_path, make_sample)
    code = (
        "import os, sys, schemas\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "dataset = schemas.ShardDataset.open(sys.argv[1])\n"
        "assert len(dataset.samples['label']) == 25 and dataset.samples.to_pylist()\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"0\n"


@pytest.mark.parametrize("rows", [0, 1, 6, 7, 20, 21, 50])
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_the_bytes_are_those_of_one_whole_table(
    rows: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_writer, "ROW_GROUP", 7)
    rejects = [Reject(f"source {i}", "ab"[i % 2], "x" * i) for i in range(rows)]
    store = Store(tmp_path)
    with TableWriter(store, "t.parquet", REJECTS_SCHEMA) as parts:
        for start in range(0, rows, at_once):
            parts.add(build_table(rejects[start : start + at_once], REJECTS_SCHEMA))
            assert parts.waiting_rows < 7
    buffer = io.BytesIO()
    table = build_table(rejects, REJECTS_SCHEMA)
    pq.write_table(table, buffer, row_group_size=7, **PARQUET_OPTIONS)
    assert store.read("t.parquet") == buffer.getvalue()
    if rows <= 7:
        assert buffer.getvalue() == to_parquet(table)


def test_many_small_tables_are_held_as_a_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of a dataset may be small, and most have no rejects."""
    monkeypatch.setattr(table_writer, "SMALL_TABLES", 10)
    rejects = [Reject(f"source {i}", "ab"[i % 2], "x" * (i % 9)) for i in range(500)]
    store = Store(tmp_path)
    with TableWriter(store, "t.parquet", REJECTS_SCHEMA) as parts:
        for reject in rejects:
            parts.add(build_table([reject], REJECTS_SCHEMA))
            parts.add(REJECTS_SCHEMA.empty_table())
        assert len(parts.waiting) == 50
    assert store.read("t.parquet") == to_parquet(build_table(rejects, REJECTS_SCHEMA))


@pytest.mark.parametrize("where", ["path", "memory"])
def test_a_table_that_fails_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    store = Store(tmp_path / "out" if where == "path" else f"memory://failing/{tmp_path.name}")

    def write_half() -> None:
        with TableWriter(store, "t.parquet", REJECTS_SCHEMA) as parts:
            parts.add(build_table([Reject("a", "b")], REJECTS_SCHEMA))
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        write_half()
    assert not store.exists("t.parquet")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stream = store.write_stream("t.parquet")
    stream.file.close()
    stream.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  closed by the stream
    with pytest.raises(UserError, match=r"t\.parquet: no space left"), stream:
        stream.write(b"x")
    assert not list(tmp_path.iterdir())


def test_keys_are_compared_by_their_text_where_hashes_collide(
    make_sample: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = KeyHashes()
    hashes.add(["a", "b", "c"])
    hashes.add(["d", "b"])
    assert hashes.repeated() == {hash("b")}
    # Every key is a candidate, but none is repeated.
    monkeypatch.setattr(
        KeyHashes, "repeated", lambda self: {hash(f"sample-{i:04d}") for i in range(99)}
    )
    dataset = write(tmp_path / "set", make_sample)
    assert dataset.verify().clean
    with pytest.raises(UserError, match="sample-0001 is repeated in shard 1"):
        write_dataset(
            tmp_path / "twice",
            [make_sample(index) for index in (0, 1, 2, 1)],
            name="test",
            classes=["a", "b", "c"],
            shard_samples=2,
        )
    assert not (tmp_path / "twice" / SAMPLES).exists()
