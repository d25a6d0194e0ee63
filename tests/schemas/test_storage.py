"""Test that a file is written as a whole or not at all."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from bench.object_store import ObjectServer
from schemas import Sample, ShardDataset, UserError, storage, write_dataset
from schemas.storage import Store
from schemas.streams import RangeReader


def test_a_failed_write_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write("folder/file", b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"folder/file: no space left.*run the command again"):
        store.write("folder/file", b"after")
    assert store.read("folder/file") == b"before"
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("pieces", [1, 2], ids=["noticed at the end", "noticed by a write"])
def test_a_disk_that_is_full_for_a_stream_is_named(pieces: int, tmp_path: Path) -> None:
    def write() -> None:
        with Store(tmp_path).write_stream("file") as stream:
            stream.file.close()
            stream.file = open("/dev/full", "wb", buffering=1000)  # noqa: SIM115
            for _ in range(pieces):
                stream.write(b"x" * 600)

    with pytest.raises(UserError, match=r"file: no space left.*run the command again"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.write("file", b"before")
    seen: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(store.read("file")))
    store.write("file", b"after")
    assert seen[0] == b"before"
    assert store.read("file") == b"after"


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (None, 3), (2, None), (0, 0), (2, 5), (3, 100), (8, 9), (99, 100)],
)
def test_a_part_of_a_local_file_is_read_as_one_in_a_store(
    start: int | None, end: int | None, tmp_path: Path
) -> None:
    for store in Store(tmp_path), Store("memory://ranges"):
        store.write("file", b"12345678")
        assert store.read("file", start, end) == b"12345678"[start:end]


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "shards").write_text("")
    with pytest.raises(UserError, match="a file is in the way"):
        Store(tmp_path).write("shards/000000.tar", b"")


def test_left_over_temporaries_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("shards/000000.tar", b"whole")
    (tmp_path / "shards" / "000001.tar.deadbeef.tmp").write_bytes(b"ha")
    assert store.remove_temporaries("shards") == 1
    assert list(store.sizes("shards")) == ["000000.tar"]


def test_links_to_files_are_files(tmp_path: Path) -> None:
    """Data sets that annexes and caches of hubs manage consist of links."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "annexed").write_bytes(b"12345")
    (tmp_path / "shards" / "000000.tar").symlink_to(tmp_path / "annexed")
    (tmp_path / "shards" / "000001.tar").symlink_to(tmp_path / "lost")
    (tmp_path / "shards" / "000002.tar").symlink_to(tmp_path)
    assert Store(tmp_path).sizes("shards") == {"000000.tar": 5}


def test_listing_while_others_write(tmp_path: Path) -> None:
    """Temporary files are renamed between the listing and the look at their size."""
    store, ended = Store(tmp_path), threading.Event()
    store.write("shards/000000.tar", b"12345")

    def write() -> None:
        for number in range(2000):
            path = tmp_path / "shards" / f"000001.tar.{number:08x}.tmp"
            path.touch()
            path.unlink()
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert store.sizes("shards")["000000.tar"] == 5
    writer.join()


def test_listing_a_missing_folder(tmp_path: Path) -> None:
    assert Store(tmp_path / "absent").sizes("shards") == {}
    assert Store("memory://absent").sizes("shards") == {}


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a missing key and an address without a server: drivers raise their own errors."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)  # in place of 5, with pauses of 2 s together
    S3FileSystem.clear_instance_cache()
    for key, reason in (("", "Unable to locate credentials"), ("key", "Could not connect")):
        if key:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
            S3FileSystem.clear_instance_cache()
        store = Store("s3://bucket/folder")
        for ask in (store.exists, store.size, store.read, store.open, store.sizes, globbed, walked):
            with pytest.raises(UserError) as caught:
                ask(store) if ask in (globbed, walked) else ask("file")
            message = str(caught.value)
            assert message.startswith(f"s3://bucket/folder: the store does not answer ({reason}")
            assert "keys and the network" in message
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("text", ["Access Denied", ""])
def test_a_store_that_refuses_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3fs raises a PermissionError without a number for wrong keys."""
    store = Store("memory://refusing")
    store.write("folder/file", b"content")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(*[text] * bool(text))

    for name in ("exists", "isdir", "glob", "info", "cat_file", "find"):
        monkeypatch.setattr(store.fs, name, refuse)
    reason = text or "PermissionError"
    for ask in (
        lambda: store.exists("folder"),
        lambda: store.is_folder("folder"),
        lambda: store.sizes("folder"),
        lambda: store.glob("memory://refusing/*"),
        lambda: list(store.walk("folder")),
        lambda: store.read_ranges("folder/file"),
    ):
        with pytest.raises(UserError, match=rf"cannot be read \({reason}\); .* your keys and"):
            ask()
    with pytest.raises(UserError, match=r"/refusing/folder/file: cannot be read"):
        RangeReader(store, "folder/file", 7).read()


def test_an_error_without_text_is_named_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://silent")

    def fail(path: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(store.fs, "exists", fail)
    with pytest.raises(UserError, match=r"does not answer \(RuntimeError\)"):
        store.exists("file")


@pytest.mark.parametrize(
    ("links", "first_repeat"),
    [
        ({"a/x": "../b", "b/y": "../a"}, "a/x/y"),
        ({"a/x": "../b", "b/y": "../c", "c/z": "../a"}, "a/x/y/z"),
        ({"a/x": "../../out/b", "../out/b/y": "../../out"}, "a/x/y"),
        ({"a/x": "../../out/b", "../out/b/y": "../../in", "../in/z": "../out"}, "a/x/y/z"),
        ({"a/x": "../../out/b", "../out/b/y": "../.."}, "a/x/y"),
    ],
)
def test_links_that_form_a_cycle_are_named(
    links: dict[str, str], first_repeat: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for link, target in links.items():
        path = Path(os.path.normpath(root / link))
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "photo.jpg").touch()
        path.symlink_to(target)
    with pytest.raises(UserError, match=f"root/{first_repeat}: leads back to a folder that holds"):
        list(Store(root).walk())


def test_two_links_to_one_folder_are_not_a_cycle(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    (tmp_path / "c" / "photo.jpg").touch()
    (tmp_path / "a" / "x").symlink_to("../c")
    (tmp_path / "b" / "x").symlink_to("../c")
    names = ["a/x/photo.jpg", "b/x/photo.jpg", "c/photo.jpg"]
    assert sorted(Store(tmp_path).walk()) == names


def globbed(store: Store) -> list[str]:
    return store.glob("s3://bucket/folder/*.jpg")


def walked(store: Store) -> list[str]:
    return list(store.walk())


@pytest.mark.parametrize("fault", ["500", "503", "cut"])
def test_a_dataset_is_opened_although_a_server_fails_once(
    fault: str, tmp_path: Path, make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "RETRY_DELAYS", (0.01, 0.01))
    samples = [make_sample(index) for index in range(4)]
    write_dataset(tmp_path / "d", samples, name="t", classes=["a", "b", "c"])
    with ObjectServer(tmp_path) as server:
        server.fault = lambda path, before: fault if before == 0 else None
        assert len(ShardDataset.open(f"{server.url}/d")) == 4
        server.fault = lambda path, before: fault
        with pytest.raises(UserError, match=r"dataset\.json|does not answer"):
            ShardDataset.open(f"{server.url}/d")


def test_what_a_server_refuses_is_asked_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    asked = []

    def refuse(path: str, before: int) -> str:
        asked.append(path)
        return "403"

    with ObjectServer(tmp_path, fault=refuse) as server, pytest.raises(UserError):
        Store(server.url).read("file")
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_reads_a_store_that_its_parent_has_opened(tmp_path: Path) -> None:
    """As the workers of torch's DataLoader do; a driver of fsspec serves one process only."""
    (tmp_path / "file").write_bytes(b"content")
    with ObjectServer(tmp_path) as server:
        store = Store(server.url)
        assert store.read("file") == b"content"
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # ends it if it hangs
            status = 1
            try:
                status = int(store.read("file") != b"content")
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
