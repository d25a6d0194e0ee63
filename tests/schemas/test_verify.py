"""Test that `verify` finds and names everything that is wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import Problem, Sample, ShardDataset, UserError, write_dataset
from schemas.counts import format_count
from schemas.shard import Member, list_members
from schemas.storage import Store
from schemas.verify import VerifyOptions, verify_dataset
from schemas.verify_record import VerifyRecord


@pytest.fixture(scope="module")
def whole(make_sample: Callable[..., Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    samples = [make_sample(index) for index in range(9)]
    write_dataset(folder, samples, name="test", classes=["a", "b", "c"], shard_samples=3)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "set"))


def problems(folder: Path) -> list[Problem]:
    return ShardDataset.open_unchecked(folder).verify().problems


def member(folder: Path, shard: int, extension: str) -> tuple[Path, Member]:
    """Return the path of a shard's tar, and a member of its middle sample."""
    path = folder / "shards" / f"{shard:06d}.tar"
    found = [m for m in list_members(path.read_bytes()) if m.extension == extension]
    return path, found[1]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x01
    path.write_bytes(content)


def rewrite_table(path: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path)


def test_a_whole_dataset_is_clean(folder: Path) -> None:
    report = ShardDataset.open(folder).verify()
    assert report.clean
    assert (report.samples, report.shards) == (9, 3)
    assert "clean: 9 samples, 3 shards" in str(report)


def test_tables_merged_by_a_version_that_knew_fewer_columns_are_clean(folder: Path) -> None:
    table = pq.read_table(folder / "samples.parquet").drop_columns(["foreground", "source"])
    pq.write_table(table, folder / "samples.parquet")
    assert ShardDataset.open(folder).verify().clean


@pytest.mark.parametrize("column", ["shard", "label", "saliency_min"])
def test_a_value_that_is_missing_is_a_problem(folder: Path, column: str) -> None:
    """A join in another library, to give new labels, leaves some rows without one."""
    rewrite_table(folder / "samples.parquet", lambda rows: [*rows[:-1], rows[-1] | {column: None}])
    assert f"samples.parquet: a value of {column} is missing" in problems(folder)[0].what
    with pytest.raises(UserError, match=f"a value of {column} is missing"):
        list(ShardDataset.open(folder))


@pytest.mark.parametrize("extension", ["jpg", "saliency.png", "cls"])
def test_a_flipped_byte_is_named_by_its_member(folder: Path, extension: str) -> None:
    path, where = member(folder, 1, extension)
    flip(path, where.offset + where.size // 2)
    [problem] = problems(folder)
    assert problem.where == f"shards/000001.tar: {where.key}.{extension}"


def test_every_flipped_byte_of_a_shard_is_noticed(folder: Path) -> None:
    """Flip a byte in each block of the tar: headers, contents, padding and end."""
    path = folder / "shards" / "000002.tar"
    good = path.read_bytes()
    for place in range(7, len(good), 509):
        flip(path, place)
        found = problems(folder)
        assert found, f"byte {place}"
        assert all("000002.tar" in problem.where for problem in found)
        path.write_bytes(good)


def test_progress_counts_every_sample(folder: Path) -> None:
    counted: list[int] = []
    ShardDataset.open(folder).verify(progress=counted.append)
    assert sum(counted) == 9


def test_a_cut_tar(folder: Path) -> None:
    path, where = member(folder, 1, "jpg")
    path.write_bytes(path.read_bytes()[: where.offset + 10])
    found = problems(folder)
    assert any("bytes, the table says" in p.what for p in found)
    assert any(f"cut short inside {where.key}.jpg" in p.what for p in found)
    assert {p.where for p in found} == {"shards/000001.tar"}


def test_a_missing_tar(folder: Path) -> None:
    (folder / "shards" / "000000.tar").unlink()
    assert problems(folder) == [Problem("shards/000000.tar", "missing")]


def test_a_missing_index(folder: Path) -> None:
    (folder / "shards" / "000000.idx").unlink()
    assert problems(folder) == [Problem("shards/000000.idx", "missing")]


def test_a_stale_index(folder: Path) -> None:
    shutil.copy(folder / "shards" / "000001.idx", folder / "shards" / "000000.idx")
    [problem] = problems(folder)
    assert problem.where == "shards/000000.idx"
    assert "stale" in problem.what


def test_a_shard_that_the_tables_do_not_know(folder: Path) -> None:
    shutil.copy(folder / "shards" / "000001.tar", folder / "shards" / "000007.tar")
    [problem] = problems(folder)
    assert problem.where == "shards/000007.tar"


def test_a_row_without_its_sample(folder: Path) -> None:
    def add(rows: list[dict]) -> list[dict]:
        return [*rows, rows[-1] | {"key": "ghost", "index": 3}]

    rewrite_table(folder / "samples.parquet", add)
    found = problems(folder)
    assert Problem("shards/000002.tar: ghost", "in samples.parquet but not in the tar") in found
    assert any(p.where == "dataset.json" and "counts 9 samples" in p.what for p in found)


def test_a_sample_without_its_row(folder: Path) -> None:
    rewrite_table(folder / "samples.parquet", lambda rows: rows[1:])
    found = problems(folder)
    assert any("in the tar but not in samples.parquet" in p.what for p in found)


def test_a_key_that_comes_twice(folder: Path) -> None:
    rewrite_table(folder / "samples.parquet", lambda rows: [rows[1], *rows[1:]])
    assert any("more than once" in p.what for p in problems(folder))


def test_a_label_without_a_class(folder: Path) -> None:
    card = json.loads((folder / "dataset.json").read_text())
    card["classes"] = ["a"]
    (folder / "dataset.json").write_text(json.dumps(card))
    [problem] = problems(folder)
    assert problem.what == "has labels [1, 2] of 1 class"


@pytest.mark.parametrize("field", ["samples", "shards", "rejects"])
def test_a_wrong_count_in_the_card(folder: Path, field: str) -> None:
    card = json.loads((folder / "dataset.json").read_text())
    card[field] += 1
    (folder / "dataset.json").write_text(json.dumps(card))
    [problem] = problems(folder)
    assert problem.where == "dataset.json"
    assert f"counts {format_count(card[field], field[:-1])}, " in problem.what


def test_a_wrong_count_in_the_shards_table(folder: Path) -> None:
    rewrite_table(folder / "shards.parquet", lambda rows: [rows[0] | {"samples": 4}, *rows[1:]])
    found = problems(folder)
    assert any("000000.tar has 4 samples, samples.parquet 3" in p.what for p in found)


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_marker_that_is_not_the_shards(folder: Path, damage: str) -> None:
    marker = folder / "shards" / "000001.parquet"
    if damage == "missing":
        marker.unlink()
    elif damage == "cut":
        marker.write_bytes(marker.read_bytes()[:100])
    else:
        shutil.copy(folder / "shards" / "000000.parquet", marker)
    [problem] = problems(folder)
    assert problem.where == "shards/000001.parquet"


@pytest.mark.parametrize("damage", ["missing", "a page", "the footer", "a folder"])
@pytest.mark.parametrize("name", ["samples.parquet", "rejects.parquet"])
def test_a_table_that_cannot_be_read(folder: Path, name: str, damage: str) -> None:
    """The shards are looked at as far as that is possible without the table."""
    table = folder / name
    content = bytearray(table.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    place = {"a page": 4, "the footer": footer}.get(damage, 0)
    content[place : place + 20] = bytes(20)
    table.unlink()
    if damage == "a folder":
        table.mkdir()
    elif damage != "missing":
        table.write_bytes(content)
    (folder / "shards" / "000002.idx").unlink()
    (folder / "shards" / "other.tar").touch()
    found = problems(folder)
    if (name, damage) != ("rejects.parquet", "a page"):  # that table has no rows
        assert name in {problem.where for problem in found}
    assert "shards/other.tar" in {problem.where for problem in found}
    if name == "rejects.parquet":
        assert Problem("shards/000002.idx", "missing") in found
    else:
        assert sum("not checked: " in problem.what for problem in found) == 3


@pytest.mark.parametrize("name", ["samples.parquet", "rejects.parquet"])
def test_no_flipped_byte_of_a_table_ends_the_verification(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    seen = []
    for place in range(0, len(good), 97):
        flip(folder / name, place)
        seen.append(problems(folder))
        (folder / name).write_bytes(good)
    assert any(name in f"{problem.where} {problem.what}" for found in seen for problem in found)
    assert problems(folder) == []


def test_an_extension_that_stopped_before_the_card(folder: Path, whole: Path) -> None:
    card = json.loads((whole / "dataset.json").read_text()) | {"samples": 6, "shards": 2}
    (folder / "dataset.json").write_text(json.dumps(card))
    assert problems(folder) == [
        Problem("dataset.json", "counts 6 samples, samples.parquet has 9"),
        Problem("dataset.json", "counts 2 shards, shards.parquet has 3"),
    ]


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_folder_in_place_of_a_file_of_a_shard(folder: Path, suffix: str) -> None:
    path = folder / "shards" / f"000001.{suffix}"
    path.unlink()
    path.mkdir()
    [problem] = problems(folder)
    assert problem.where == f"shards/000001.{suffix}"
    assert "Is a directory" in problem.what


def test_a_disk_that_fails_is_a_problem_of_each_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.read

    def fail(self: Store, name: str, *limits: int) -> bytes:
        if "000001" in name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, name, *limits)

    monkeypatch.setattr(Store, "read", fail)
    assert problems(folder) == [
        Problem(
            "shards/000001.parquet",
            f"{folder}/shards/000001.parquet: cannot be read (Input/output error); look at its "
            "permissions and at the disk",
        ),
        Problem("shards/000001.tar", "cannot be read (Input/output error)"),
    ]


def test_drawn_shards_are_the_only_ones_read(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    chosen = [VerifyOptions(shards=1, seed=seed).choose(dataset.shards) for seed in range(20)]
    assert {row.shard for [row] in chosen} == {0, 1, 2}
    for extension in ("tar", "idx", "parquet"):
        (folder / "shards" / f"000001.{extension}").write_bytes(b"damaged")
    for seed, [row] in enumerate(chosen):
        report = verify_dataset(dataset, VerifyOptions(shards=1, seed=seed))
        assert report.clean == (row.shard != 1)
        assert "1 of 3 shards (the others were not looked at)" in str(report)
    assert len(VerifyOptions(shards=9).choose(dataset.shards)) == 3
    with pytest.raises(UserError, match="--shards is 0"):
        VerifyOptions(shards=0)


def test_an_interrupted_verification_resumes(folder: Path, tmp_path: Path) -> None:
    dataset, record = ShardDataset.open(folder), tmp_path / "record.jsonl"
    counted: list[int] = []

    def interrupt(samples: int) -> None:
        counted.append(samples)
        if len(counted) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.verify(1, interrupt, record=record)
    report = dataset.verify(progress=counted.append, record=record)
    assert (report.clean, report.shards, report.skipped, counted) == (True, 1, 2, [3, 3, 3])
    assert "1 shard, 2 more by earlier runs" in str(report)
    assert dataset.verify(record=record).shards == 0


def test_shards_with_problems_are_read_again(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    path, where = member(folder, 1, "jpg")
    flip(path, where.offset)
    dataset = ShardDataset.open(folder)
    for _ in range(2):
        report = dataset.verify(record=record)
        assert [problem.where for problem in report.problems] == [
            f"shards/000001.tar: {where.key}.jpg"
        ]
    assert (report.shards, report.skipped) == (1, 2)


def test_a_record_that_was_cut_short_loses_one_shard(folder: Path, tmp_path: Path) -> None:
    dataset, record = ShardDataset.open(folder), tmp_path / "record.jsonl"
    dataset.verify(record=record)
    record.write_bytes(record.read_bytes()[:-3])
    assert (dataset.verify(record=record).shards, dataset.verify(record=record).shards) == (1, 0)


def test_a_record_truncated_anywhere_resumes_and_becomes_complete(
    folder: Path, tmp_path: Path
) -> None:
    dataset, path = ShardDataset.open(folder), tmp_path / "record.jsonl"
    dataset.verify(record=path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with VerifyRecord(path, dataset.digest) as record:
            assert record.clean == {n for n in range(3) if b'{"shard": %d}' % n in content[:length]}
            for row in dataset.shards:
                if row.shard not in record.clean:
                    record.add(row, [])
        assert path.read_bytes() == content


def test_a_damaged_byte_of_a_record_has_at_most_two_shards_read_again(
    folder: Path, tmp_path: Path
) -> None:
    dataset, path = ShardDataset.open(folder), tmp_path / "record.jsonl"
    dataset.verify(record=path)
    content = path.read_bytes()
    for place in range(content.index(b"\n") + 1, len(content)):
        for byte in (b"\0", b"\n", b"\xff", b"["):
            path.write_bytes(content[:place] + byte + content[place + 1 :])
            with VerifyRecord(path, dataset.digest) as record:
                assert record.clean <= {0, 1, 2}
                assert len(record.clean) >= 1
    report = dataset.verify(record=path)
    assert (report.clean, report.shards) == (True, 1)
    assert dataset.verify(record=path).shards == 0


@pytest.mark.parametrize(
    "content", ['{"dataset": "other"}', '{"dataset": "oth', '{"shard": 0}\n', "not JSON", "[1]"]
)
def test_the_record_of_another_dataset_is_refused(
    folder: Path, tmp_path: Path, content: str
) -> None:
    record = tmp_path / "record.jsonl"
    record.write_text(content)
    with pytest.raises(UserError, match=r"record\.jsonl: "):
        ShardDataset.open(folder).verify(record=record)
    assert record.read_text() == content


def test_a_record_that_does_not_fit_on_the_disk_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full").open("wb")  # noqa: SIM115
    monkeypatch.setattr("schemas.verify_record.open_to_append", lambda path: full)
    record = tmp_path / "record.jsonl"
    record.write_text(json.dumps({"dataset": ShardDataset.open(folder).digest}) + "\n")
    with pytest.raises(UserError, match=r"record\.jsonl: the record cannot be written .*No space"):
        ShardDataset.open(folder).verify(record=record)


def test_the_command_exits_with_1_and_names_the_problem(folder: Path) -> None:
    path, where = member(folder, 1, "jpg")
    flip(path, where.offset)
    command = [sys.executable, "-m", "schemas", "verify", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{where.key}.jpg" in result.stdout
    for shard in range(50):
        (folder / "shards" / f"9{shard:05d}.tar").touch()
    assert "\n  ... and 31 more" in str(ShardDataset.open(folder).verify())
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.count("not a file of any shard") == 50
    (folder / "dataset.json").unlink()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
