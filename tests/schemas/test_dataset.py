"""Test a dataset on disk: write, open and iterate it, on any fsspec URL, with any reader."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import wds2idx
from PIL import Image

from schemas import FormatError, Sample, ShardDataset, UserError, write_dataset
from schemas.shard import list_members
from schemas.storage import Store
from tests.readers import MEMBERS, READERS

Make = Callable[..., Sample]


@pytest.fixture
def samples(make_sample: Make) -> list[Sample]:
    return [make_sample(index) for index in range(25)]


def write(url: str | Path, samples: list[Sample]) -> ShardDataset:
    return write_dataset(
        url, samples, name="test", classes=["a", "b", "c"], shard_samples=10, split="train"
    )


@pytest.mark.parametrize("where", ["path", "memory"])
def test_a_written_dataset_is_read_back(where: str, samples: list[Sample], tmp_path: Path) -> None:
    url = tmp_path / "set" if where == "path" else f"memory://{tmp_path.name}/set"
    write(url, samples)
    dataset = ShardDataset.open(url)
    assert len(dataset) == 25
    assert [row.samples for row in dataset.shards] == [10, 10, 5]
    assert dataset.classes == ["a", "b", "c"]
    for read, written in zip(dataset, samples, strict=True):
        for field in dataclasses.fields(Sample):
            if field.name != "saliency":
                assert getattr(read, field.name) == getattr(written, field.name)
        step = np.ptp(written.saliency) / 255
        assert abs(read.saliency - written.saliency).max() <= step
    assert dataset.verify().clean
    for location in dataset.shard_urls + dataset.index_urls:
        assert fsspec.open(location).open().read(1)


def test_equal_samples_give_equal_bytes(samples: list[Sample], tmp_path: Path) -> None:
    write(tmp_path / "a", samples)
    write(tmp_path / "b", samples)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4 + 3 * 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_digest_follows_content(samples: list[Sample], tmp_path: Path) -> None:
    first = write(tmp_path / "a", samples)
    assert write("memory://digest/b", samples).digest == first.digest
    assert write(tmp_path / "c", samples[:24]).digest != first.digest


def test_index_is_that_of_dalis_own_tool(samples: list[Sample], tmp_path: Path) -> None:
    dataset = write(tmp_path, samples)
    for tar, index in zip(dataset.shard_urls, dataset.index_urls, strict=True):
        with wds2idx.IndexCreator(tar, str(tmp_path / "theirs.idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "theirs.idx").read_bytes() == Path(index).read_bytes()


def test_tarfile_reads_the_shards(samples: list[Sample], tmp_path: Path) -> None:
    dataset = write(tmp_path, samples)
    written = iter(samples)
    for url in dataset.shard_urls:
        with tarfile.open(url, "r:") as tar:
            members = tar.getmembers()
            assert [m.name.partition(".")[2] for m in members] == MEMBERS * (len(members) // 3)
            assert {(m.mtime, m.uid, m.gid, m.uname, m.type) for m in members} == {
                (0, 0, 0, "", tarfile.REGTYPE)
            }
            assert all(not m.pax_headers for m in members)
            for image, saliency, label in zip(*[iter(members)] * 3, strict=True):
                sample = next(written)
                assert image.name == f"{sample.key}.jpg"
                assert tar.extractfile(image).read() == sample.image
                assert Image.open(tar.extractfile(saliency)).size == (28, 28)
                assert int(tar.extractfile(label).read()) == sample.label
    assert next(written, None) is None


@pytest.mark.parametrize("reader", READERS)
def test_other_libraries_read_the_shards(
    samples: list[Sample], tmp_path: Path, reader: str
) -> None:
    seen = list(READERS[reader](write(tmp_path, samples)))
    assert seen == [(s.label, (s.height, s.width), (28, 28)) for s in samples]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "other characters"),
        ({"key": "a/b"}, "other characters"),
        ({"key": ""}, "other characters"),
        ({"key": "k" * 65}, "longer than 64"),
        ({"label": -2}, "below -1"),
        ({"label": 1.0}, r"label 1\.0 is not an integer"),
        ({"label": True}, "label True is not an integer"),
        ({"extension": "exe"}, "unknown image extension"),
        ({"image": b""}, "no bytes"),
        ({"height": 0}, "0 x 56"),
    ],
)
def test_a_sample_that_cannot_be_stored_is_refused(
    change: dict, message: str, make_sample: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_sample(0), **change)


def test_the_longest_key_fits(make_sample: Make, tmp_path: Path) -> None:
    sample = dataclasses.replace(make_sample(0), key="k" * 64)
    assert [s.key for s in write(tmp_path, [sample])] == ["k" * 64]


def test_a_key_that_comes_twice_is_refused(make_sample: Make, tmp_path: Path) -> None:
    samples = [make_sample(index) for index in range(15)]
    with pytest.raises(UserError, match="sample-0003 is repeated"):
        write(tmp_path, [*samples, samples[3]])
    assert not (tmp_path / "dataset.json").exists()


def test_maps_of_two_sides_are_refused(make_sample: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one side, not of \[14, 28\]"):
        write(tmp_path, [make_sample(0), make_sample(1, side=14)])
    assert not (tmp_path / "shards").exists()


def test_a_key_that_comes_twice_in_a_shard_is_refused(make_sample: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sample-0001 comes twice; keys must be unique"):
        write(tmp_path, [make_sample(index) for index in (0, 1, 1)])
    assert not (tmp_path / "shards").exists()


def test_a_label_without_a_class_is_refused(make_sample: Make, tmp_path: Path) -> None:
    samples = [make_sample(index) for index in range(3)]
    with pytest.raises(UserError, match="sample-0000 has the label 0, but there are 0 classes"):
        write_dataset(tmp_path, samples, name="test")
    with pytest.raises(UserError, match="sample-0002 has the label 2, but there are 2 classes"):
        write_dataset(tmp_path, samples, name="test", classes=["a", "b"])
    assert not (tmp_path / "shards").exists()


def test_no_samples_are_refused(tmp_path: Path) -> None:
    for shard_samples in (0, -1):
        with pytest.raises(UserError, match=f"shard_samples is {shard_samples}; it must be at l"):
            write_dataset(tmp_path, [], name="test", shard_samples=shard_samples)
    with pytest.raises(UserError, match="there is no sample to write"):
        write(tmp_path, [])


def test_a_folder_in_use_is_refused(samples: list[Sample], tmp_path: Path) -> None:
    write(tmp_path, samples)
    with pytest.raises(UserError, match="has shards already"):
        write(tmp_path, samples)


def test_opening_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset here.*saliency-precompute"):
        ShardDataset.open(tmp_path / "absent")
    with pytest.raises(UserError, match="nonsense"):
        ShardDataset.open("nonsense://bucket/set")


@pytest.mark.parametrize("name", ["dataset.json", "shards.parquet", "samples.parquet"])
@pytest.mark.parametrize("where", ["path", "memory"])
def test_a_file_that_may_not_be_read_is_named(
    where: str, name: str, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "set" if where == "path" else f"memory://{tmp_path.name}/set"
    write(url, samples)
    read = Store.read

    def refuse(self: Store, file: str, *limits: int) -> bytes:
        if file == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(self, file, *limits)

    monkeypatch.setattr(Store, "read", refuse)
    advice = "permissions" if where == "path" else "keys"
    with pytest.raises(
        UserError, match=rf"/{name}: cannot be read \(Permission denied\); .*{advice}"
    ):
        list(ShardDataset.open(url))


@pytest.mark.parametrize("name", ["dataset.json", "shards.parquet", "shards/000001.tar"])
def test_a_pipe_in_place_of_a_file_is_named(
    name: str, samples: list[Sample], tmp_path: Path
) -> None:
    write(tmp_path, samples)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: a named pipe; only files are read"):
        list(ShardDataset.open(tmp_path))


def test_opening_an_unfinished_dataset_says_so(samples: list[Sample], tmp_path: Path) -> None:
    write(tmp_path, samples)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"not finished.*precompute command again"):
        ShardDataset.open(tmp_path)


def test_opening_a_dataset_whose_extension_stopped_before_the_card_says_so(
    samples: list[Sample], tmp_path: Path
) -> None:
    write(tmp_path / "before", samples[:20])
    write(tmp_path / "set", samples)
    shutil.copy(tmp_path / "before" / "dataset.json", tmp_path / "set")
    with pytest.raises(
        UserError,
        match=r"not finished.* 20 samples in 2 shards, shards\.parquet 25 in 3; run the same",
    ):
        ShardDataset.open(tmp_path / "set")


def test_a_longer_table_of_samples_is_refused_where_it_is_read(
    samples: list[Sample], tmp_path: Path
) -> None:
    write(tmp_path / "set", samples[:20])
    write(tmp_path / "after", samples)
    # an extension stopped before it wrote shards.parquet
    shutil.copy(tmp_path / "after" / "samples.parquet", tmp_path / "set")
    dataset = ShardDataset.open(tmp_path / "set")
    with pytest.raises(
        UserError, match=r"not finished.* counts 20 samples, samples\.parquet 25; run the same"
    ):
        list(dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2.*newer version.*upgrade"),
        ({"format_version": None}, "not a card"),
        ({"samples": ...}, "missing 1 required positional argument: 'samples'"),
        ({"samples": "25"}, "its samples is '25', not of type int"),
        ({"shards": True}, "its shards is True, not of type int"),
        ({"classes": None}, "its classes is None, not of type list"),
        ({"classes": [["a"], "b", "c"]}, "its classes are not all text"),
        ({"estimator": "scda"}, "its estimator is 'scda', not of type dict"),
        ({"versions": None}, "its versions is None, not of type dict"),
    ],
)
def test_a_card_of_another_format_is_refused(
    change: dict, message: str, samples: list[Sample], tmp_path: Path
) -> None:
    write(tmp_path, samples)
    card = json.loads((tmp_path / "dataset.json").read_text()) | change
    card = {key: value for key, value in card.items() if value is not ...}
    (tmp_path / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match=message):
        ShardDataset.open(tmp_path)


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_card_that_is_not_json_is_refused(
    content: str, samples: list[Sample], tmp_path: Path
) -> None:
    write(tmp_path, samples)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(FormatError, match="not JSON"):
        ShardDataset.open(tmp_path)


def test_a_damaged_byte_of_the_table_of_shards_raises_only_our_errors(
    samples: list[Sample], tmp_path: Path
) -> None:
    table = write(tmp_path, samples).store.path("shards.parquet")
    content = Path(table).read_bytes()
    for place in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[place] ^= 0x11
        Path(table).write_bytes(damaged)
        with contextlib.suppress(UserError):
            ShardDataset.open(tmp_path)


def test_iterating_never_yields_less_than_the_tables_say(
    samples: list[Sample], tmp_path: Path
) -> None:
    dataset = write(tmp_path, samples)
    shard = tmp_path / "shards" / "000001.tar"
    shard.write_bytes(shard.read_bytes()[:20000])
    with pytest.raises(FormatError, match=r"000001\.tar: cut short inside sample-"):
        list(dataset)
    shard.unlink()
    with pytest.raises(FormatError, match=r"000001\.tar: missing"):
        list(dataset)


@pytest.mark.parametrize(
    ("extension", "place", "message"),
    [
        ("saliency.png", 40, "sample sample-0012: not a sound PNG"),
        ("cls", 0, r"sample sample-0012: its label is b'\d', samples\.parquet says 0"),
    ],
)
def test_iterating_refuses_a_sample_that_differs_from_its_row(
    extension: str, place: int, message: str, samples: list[Sample], tmp_path: Path
) -> None:
    dataset = write(tmp_path, samples)
    tar = tmp_path / "shards" / "000001.tar"
    content = bytearray(tar.read_bytes())
    [member] = [m for m in list_members(content) if m[:2] == ("sample-0012", extension)]
    content[member.offset + place] ^= 1
    tar.write_bytes(content)
    read = []
    with pytest.raises(
        FormatError, match=rf"000001\.tar: {message}.*`saliency-shards verify \S+` lists all"
    ):
        read.extend(dataset)
    assert len(read) == 12


def test_schemas_imports_neither_torch_nor_dali_nor_ray() -> None:
    code = (
        "import sys, schemas, schemas.__main__\n"
        "print([m for m in ('torch', 'nvidia', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"[]"


def test_opening_starts_no_thread(samples: list[Sample], tmp_path: Path) -> None:
    """Check for threads: Python aborts if an Arrow thread holds a Python object at exit."""
    write(tmp_path, samples)
    code = (
        "import os, sys, schemas\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "dataset = schemas.ShardDataset.open(sys.argv[1])\n"
        "assert len(list(dataset)) == 25 and len(dataset.rejects) == 0\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"0\n"


def test_info_summarizes_the_dataset(samples: list[Sample], tmp_path: Path) -> None:
    write(tmp_path, samples)
    result = subprocess.run(
        [sys.executable, "-m", "schemas", "info", str(tmp_path)], capture_output=True, check=True
    )
    text = result.stdout.decode()
    for words in ("25 in 3 shards, 5 to 10 a shard", "rejects    none", "3 classes", "    a 9\n"):
        assert words in text
    assert f"{sum(len(sample.image) for sample in samples):,} of them images" in text


def test_the_members_are_the_formats_own(samples: list[Sample], tmp_path: Path) -> None:
    """Expect the two characters -1 as the label of an unlabeled sample, and an 8-bit gray map."""
    sample = dataclasses.replace(samples[0], label=-1)
    dataset = write_dataset(tmp_path, [sample], name="one")
    with tarfile.open(dataset.shard_urls[0]) as tar:
        assert tar.extractfile("sample-0000.cls").read() == b"-1"
        image = Image.open(io.BytesIO(tar.extractfile("sample-0000.saliency.png").read()))
    assert image.mode == "L"
    assert image.getextrema() == (0, 255)
    row = dataset.samples.to_pylist()[0]
    assert row["saliency_min"] == pytest.approx(sample.saliency.min())
    assert row["saliency_max"] == pytest.approx(sample.saliency.max())


def test_a_dataset_without_a_name_is_called_by_its_folder(
    make_sample: Make, tmp_path: Path
) -> None:
    for name, title in (("folder", "cats"), ("webdataset", "cats"), ("imagenet100", "imagenet100")):
        url = f"{tmp_path / name / 'cats'}/"
        write_dataset(url, [make_sample(0)], name=name, classes=["a", "b", "c"])
        assert ShardDataset.open(url).title == title


def test_a_printed_sample_leaves_out_its_bytes(make_sample: Make) -> None:
    text = repr(make_sample(0))
    assert "label=" in text
    assert "image=" not in text
    assert len(text) < 200
