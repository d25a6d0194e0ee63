"""Tests of parallel listing: it gives the same result with few requests, many at a time."""

import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import wds2idx

from bench.waiting_store import WaitingFileSystem, put
from precompute.sources import Source, SourceImage, list_images, list_source, open_source
from precompute.sources.base import LabeledText, PartedSource
from precompute.sources.tar_members import BLOCK, BlockReader, list_members_by_index
from precompute.sources.trees import Folder
from schemas import UserError
from schemas.storage import Store
from schemas.tables import Reject
from tests.conftest import encode, noise

JPEG = encode(noise(0))


@pytest.fixture
def remote() -> Iterator[type[WaitingFileSystem]]:
    """Provide an empty store that answers immediately and counts requests."""
    WaitingFileSystem.reset(0.0)
    yield WaitingFileSystem
    WaitingFileSystem.reset(0.0)


def make_tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(first: int, count: int, size: int = 0) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    members = [
        [(f"{i:05d}.jpg", JPEG + bytes(size)), (f"{i:05d}.cls", str(i % 7).encode())]
        for i in numbers
    ]
    return [member for pair in members for member in pair]


def fill(tars: int, per_tar: int, index: bool = False) -> None:
    for number in range(tars):
        tar = make_tar(samples(number * per_tar, per_tar))
        put(f"bucket/tars/{number:04d}.tar", tar)
        if index:
            put(f"bucket/tars/{number:04d}.idx", make_index(tar))


def make_index(tar: bytes) -> bytes:
    """Return the index that DALI's tool creates for a tar."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        path.write_bytes(tar)
        with wds2idx.IndexCreator(str(path), f"{folder}/x.idx", verbose=False) as creator:
            creator.create_index()
        return Path(folder, "x.idx").read_bytes()


def tar_source(**options: object) -> Source:
    return open_source("webdataset", "waiting://bucket/tars", "train", False, **options)


def answer_together(
    remote: type[WaitingFileSystem], method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let the store answer only when `count` requests wait; with fewer, the barrier breaks."""
    together, plain = threading.Barrier(count, timeout=20), getattr(remote, method)

    def answer(*arguments: object, **options: object) -> object:
        together.wait()
        return plain(*arguments, **options)

    monkeypatch.setattr(remote, method, answer)


def test_tars_are_listed_by_one_request_each_and_many_together(
    remote: type[WaitingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tars=100, per_tar=3)
    source = tar_source()
    beside = remote.requests.total()
    answer_together(remote, "cat_file", 20, monkeypatch)
    images = list_images(list_source(source))[0]
    monkeypatch.undo()
    assert len(images) == 300
    assert [image.label for image in images] == [i % 7 for i in range(300)]
    assert source.classes == [str(i) for i in range(7)]
    assert remote.requests["read"] == 100
    assert beside < 10  # fewer than one per tar
    assert remote.requests.total() == beside + 100
    assert images == list_images(tar_source().images())[0]
    assert source.read(images[7]) == JPEG


def test_large_members_are_left_out_and_small_ones_read_over(
    remote: type[WaitingFileSystem],
) -> None:
    put("bucket/tars/large.tar", make_tar(samples(0, 4, size=2 * BLOCK)))
    put("bucket/tars/small.tar", make_tar(samples(4, 200)))
    assert len(make_tar(samples(4, 200))) < BLOCK
    read: list[int] = []
    plain = remote.cat_file

    def spy(self: WaitingFileSystem, path: str, start: int, end: int) -> bytes:
        content = plain(self, path, start, end)
        read.append(len(content))
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "cat_file", spy)
        assert len(list(tar_source().images())) == 204
    assert len(read) == 5 + 1  # one after each image, and one for the whole small tar
    assert sum(read) < 6 * BLOCK


def test_an_index_beside_a_tar_saves_reading_it(remote: type[WaitingFileSystem]) -> None:
    put("bucket/tars/0.tar", make_tar(samples(0, 6, size=2 * BLOCK)))
    by_headers = list(tar_source(label_member="none").images())
    put("bucket/tars/0.idx", make_index(make_tar(samples(0, 6, size=2 * BLOCK))))
    remote.requests.clear()
    source = tar_source(label_member="none")
    before = remote.requests.total()
    assert list(source.images()) == by_headers
    assert remote.requests.total() == before + 2  # the index and the last header
    assert list(tar_source().images()) != by_headers  # labels come from the tar
    assert [image.label for image in tar_source().images()] == list(range(6))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"v1.1 1\njpg 512 100\n",
        b"v1.2 1\njpg 512 100\n",
        b"v1.2 1\njpg 99999 100 a.jpg\n",
        b"v1.2 1\njpg -1 100 a.jpg\n",
        b"v1.2 1\njpg x 100 a.jpg\n",
        b"v1.2 1\npng 512 100 a.jpg\n",
        b"v1.2 1\njpg 512 100 other.jpg\n",
        b"\xff\xfe",
        b"stale",
    ],
)
def test_an_index_that_does_not_describe_the_tar_is_not_used(
    index: bytes, remote: type[WaitingFileSystem], caplog: pytest.LogCaptureFixture
) -> None:
    tar = make_tar([("a.jpg", JPEG), ("a.cls", b"3")])
    if index == b"stale":
        index = make_index(make_tar([("a.jpg", JPEG + bytes(1000)), ("a.cls", b"3")]))
    put("bucket/tars/0.tar", tar)
    put("bucket/tars/0.idx", index)
    assert (
        list_members_by_index(index, BlockReader(Store("waiting://bucket/tars"), "0.tar", len(tar)))
        is None
    )
    assert "its index is not used" in caplog.text
    source = tar_source()
    [image] = source.images()
    assert (image.label, source.read(image)) == (3, JPEG)


def test_a_tar_that_is_cut_short_or_compressed_is_refused(remote: type[WaitingFileSystem]) -> None:
    fill(tars=3, per_tar=2)
    put("bucket/tars/0001.tar", make_tar(samples(0, 2))[:700])
    with pytest.raises(UserError, match=r"0001\.tar: not a whole, uncompressed tar"):
        list(list_source(tar_source()))
    put("bucket/tars/0001.tar", b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=r"0001\.tar: not a whole, uncompressed tar"):
        list(list_source(tar_source()))


def test_a_block_reader_reads_as_a_file_does(remote: type[WaitingFileSystem]) -> None:
    content = bytes(range(256)) * 40
    put("bucket/x", content)
    file, plain = BlockReader(Store("waiting://bucket"), "x", len(content)), io.BytesIO(content)
    for offset, whence, size in [
        (0, 0, 10), (-5, 2, 10), (100, 0, 3), (-50, 1, 20), (99999, 0, 5), (0, 0, -1), (3, 1, 4),
    ]:  # fmt: skip
        assert file.seek(offset, whence) == plain.seek(offset, whence)
        assert file.read(size) == plain.read(size)
        assert file.tell() == plain.tell()


def test_folders_of_a_store_are_listed_together(
    remote: type[WaitingFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{kind}/{i}.jpg" for kind in "abcdefghij" for i in range(3)]
    for name in [*names, "beside.txt"]:
        put(f"bucket/root/{name}", JPEG)
    source = Folder("waiting://bucket/root", "train", False)
    answer_together(remote, "find", 10, monkeypatch)
    listed = list(list_source(source))
    monkeypatch.undo()
    assert listed == list(source.images())
    assert [entry.location for entry in listed if isinstance(entry, SourceImage)] == names
    assert [entry.source for entry in listed if isinstance(entry, Reject)] == ["beside.txt"]


class Parts(PartedSource):
    """Source of three parts, each of which waits until all are being listed."""

    def __init__(self) -> None:
        self.together = threading.Barrier(3, timeout=10)

    def parts(self) -> list[str]:
        return ["a", "b", "c"]

    def list_part(self, part: str) -> Iterator[LabeledText | Reject]:
        self.together.wait()
        yield Reject(part, "no-image")
        yield LabeledText(SourceImage(part, part, -1), part)

    def number_labels(self, texts: object) -> tuple[dict[str, int], dict[str, str]]:
        self.classes = sorted(texts)
        return {"a": 0, "c": 1}, {"b": "because"}

    def read(self, image: SourceImage) -> bytes:
        return JPEG


def test_labels_are_numbered_when_all_parts_are_listed() -> None:
    source = Parts()
    assert list(list_source(source)) == [
        *(Reject(part, "no-image") for part in "abc"),
        SourceImage("a", "a", 0),
        Reject("b", "bad-label", "because"),
        SourceImage("c", "c", 1),
    ]
    assert source.classes == ["a", "b", "c"]


def test_a_source_that_derives_from_one_of_parts_keeps_its_own_images(tmp_path: Path) -> None:
    class Own(Folder):
        def images(self) -> Iterator[SourceImage | Reject]:
            yield SourceImage("own", "own.jpg", 0)

    for kind in "ab":
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "x.jpg").write_bytes(JPEG)
    assert [i.key for i in list_source(Own(str(tmp_path), "train", False))] == ["own"]
    assert len(list(list_source(Folder(str(tmp_path), "train", False)))) == 2


def test_an_error_of_one_part_ends_the_listing(tmp_path: Path) -> None:
    for kind in "abc":
        (tmp_path / kind).mkdir()
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b")
    with pytest.raises(UserError, match="leads back to a folder"):
        list(list_source(Folder(str(tmp_path), "train", False)))
