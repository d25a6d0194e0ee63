"""Downloads from any store are checked, and survive the faults of stores and disks."""

import errno
import os
import random
import threading
from pathlib import Path

import fsspec
import pytest

from bench.object_store import ObjectServer
from pipeline.cache import Cache, ShardCache
from schemas import ShardDataset, UserError
from schemas.tables import shard_name
from tests.pipeline.conftest import ROOM, SHARDS, Open, content, of_shard, present, wait_until

pytestmark = pytest.mark.usefixtures("small_reserve")


# --- any store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["memory", "http", "s3", "file"])
def test_any_store_gives_the_bytes_of_its_shards(
    protocol: str,
    store: Path,
    server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = {"http": f"{server.url}/b", "s3": "s3://b", "memory": "memory://cached", "file": ""}
    if protocol == "memory":
        fsspec.filesystem("memory").put(str(store / "b"), "/cached", recursive=True)
    if protocol == "s3":
        use_s3(server, monkeypatch)
    dataset = ShardDataset.open(url[protocol] or store / "b")
    cache = ShardCache(dataset, Cache(tmp_path, ROOM))
    cache.prefetch(range(SHARDS))
    for shard in range(SHARDS):
        content(cache, shard)
    # a shard can be read a moment before the thread that fetched it has counted it
    wait_until(lambda: cache.counts["fetched"] >= SHARDS)
    assert cache.counts["fetched"] == SHARDS
    assert cache.counts["bytes"] == sum(row.bytes for row in dataset.shards)


def use_s3(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # the instance of an earlier test uses another server
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_each_file_takes_one_request(
    protocol: str, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(server, monkeypatch)
    dataset = ShardDataset.open(f"{server.url}/b" if protocol == "http" else "s3://b")
    cache = ShardCache(dataset, Cache(tmp_path, ROOM))
    server.requests.clear()
    cache.prefetch(range(SHARDS))
    for shard in range(SHARDS):
        os.close(cache.open(shard).tar)
    assert set(server.requests.values()) == {1}
    assert {method for method, _ in server.requests} == {"GET"}
    assert len(server.requests) == 3 * SHARDS


# --- faults ---------------------------------------------------------------------------------------


FAULTS = ("500", "503", "429", "cut", "short", "wrong")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_http_is_tried_again(fault: str, server: ObjectServer, open_cache: Open) -> None:
    server.fault = of_shard(2, lambda before: fault if before < 2 else None)
    cache = open_cache()
    files = cache.open(2)
    assert len(os.pread(files.tar, ROOM, 0)) == cache.dataset.shards[2].bytes
    os.close(files.tar)
    assert cache.downloader.retries == 2
    content(cache, 2)


@pytest.mark.slow
def test_a_fault_of_s3_is_tried_again(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(server, monkeypatch)
    server.fault = lambda path, before: (
        FAULTS[int(path[-5]) % len(FAULTS)] if path.endswith(".tar") and before == 0 else None
    )
    cache = ShardCache(ShardDataset.open("s3://b"), Cache(tmp_path, ROOM), backoff=0.001)
    for shard, row in enumerate(cache.dataset.shards[: len(FAULTS)]):
        files = cache.open(shard)
        assert len(os.pread(files.tar, ROOM, 0)) == row.bytes
        os.close(files.tar)
    # s3fs itself retries after status 503 and after a broken connection
    assert cache.downloader.retries == len(FAULTS) - 2
    server.fault = of_shard(9, lambda before: "503")
    with pytest.raises(UserError, match=r"s3://b/shards/000009.tar: shard 9 cannot be fetched"):
        ShardCache(cache.dataset, Cache(tmp_path, ROOM), attempts=1).open(9)


@pytest.mark.parametrize("suffix", ["idx", "parquet"])
@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_fault_of_index_or_table_is_tried_again(
    suffix: str, fault: str, server: ObjectServer, open_cache: Open
) -> None:
    name = f"000002.{suffix}"
    server.fault = lambda path, before: fault if path.endswith(name) and before == 0 else None
    content(cache := open_cache(), 2)
    assert cache.downloader.retries == 1


@pytest.mark.parametrize("suffix", ["idx", "parquet"])
def test_wrong_bytes_of_index_or_table_are_replaced(
    suffix: str, server: ObjectServer, open_cache: Open
) -> None:
    """Damage both what is received at first and, later, what the cache holds."""
    cache = open_cache()
    good = cache.dataset.store.read(shard_name(2, suffix))
    damaged = good.replace(b"key-", b"kex-", 1)
    assert damaged != good
    cat_file, received = cache.downloader.fs.cat_file, []

    def cat_damaged_once(path: str) -> bytes:
        received.append(cat_file(path))
        return damaged if received.count(good) == 1 and received[-1] == good else received[-1]

    cache.downloader.fs.cat_file = cat_damaged_once
    content(cache, 2)
    assert cache.downloader.retries == 1
    cached = cache.folder.path(cache.dataset.shards[2].sha256, suffix)
    cached.write_bytes(damaged)
    content(cache, 2)
    assert cached.read_bytes() == good


REASONS = {
    "500": "Internal Server Error",
    "503": "Service Unavailable",
    "cut": "payload is not completed",
    "short": "bytes, the table says",
    "wrong": r"its sha256 is \w{64}, the table says \w{64}; `saliency-shards verify",
}


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("fault", REASONS)
def test_what_stays_broken_is_named(
    fault: str, is_ahead: bool, server: ObjectServer, open_cache: Open
) -> None:
    server.fault = of_shard(2, lambda before: fault)
    cache = open_cache(attempts=3)
    cache.prefetch([2, 4] if is_ahead else [])
    wait_until(lambda: cache._threads == 0)
    message = rf"{server.url}/b/shards/000002.tar: shard 2 cannot .* 3 attempts .*{REASONS[fault]}"
    with pytest.raises(UserError, match=message):
        cache.open(2)
    assert server.count_gets("000002.tar") == 3
    assert 2 not in present(cache)
    content(cache, 4)  # other shards are not affected
    assert not list(cache.folder.folder.glob("*.part"))
    server.fault = lambda path, before: None
    content(cache, 2)  # neither is a later attempt


@pytest.mark.parametrize("suffix", ["tar", "idx", "parquet"])
def test_a_missing_shard_is_named_at_once(
    suffix: str, server: ObjectServer, open_cache: Open
) -> None:
    server.fault = lambda path, before: "404" if path.endswith(f"000005.{suffix}") else None
    cache = open_cache()
    message = rf"{server.url}/b/shards/000005.{suffix}: shard 5 is missing"
    with pytest.raises(UserError, match=message):
        cache.open(5)
    assert cache.downloader.retries == 0
    assert server.count_gets(f"000005.{suffix}") == 1


def test_a_refusal_is_not_tried_again(server: ObjectServer, open_cache: Open) -> None:
    server.fault = of_shard(5, lambda before: "403")
    cache = open_cache()
    with pytest.raises(UserError, match="shard 5 is refused: 403"):
        cache.open(5)
    assert server.count_gets("000005.tar") == 1


def test_waits_double_with_jitter_up_to_a_bound(server: ObjectServer, open_cache: Open) -> None:
    server.fault = of_shard(1, lambda before: "500")
    cache = open_cache(attempts=9, backoff=1.0)
    waits: list[float] = []

    class Recorder(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    cache.downloader.closed = Recorder()
    state = random.getstate()
    with pytest.raises(UserError, match="9 attempts failed"):
        cache.open(1)
    assert random.getstate() == state, "drew from the generator that the user seeds"
    bases = [1, 2, 4, 8, 16, 30, 30, 30]
    assert all(0.5 * b <= wait <= 1.5 * b for b, wait in zip(bases, waits, strict=True))
    assert len({wait / base for wait, base in zip(waits, bases, strict=True)}) == len(bases)


def test_a_tar_larger_than_the_table_says_is_not_written_whole(
    open_cache: Open,
) -> None:
    cache = open_cache(attempts=1)
    row = cache.dataset.shards[3]
    cache._rows[3] = row._replace(bytes=1000)
    with pytest.raises(UserError, match="received more than the 1000 bytes in the table"):
        cache.open(3)


# --- the local disk -------------------------------------------------------------------------------


def test_a_full_disk_is_one_line(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache()

    def get_file(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.downloader.fs, "get_file", get_file)
    with pytest.raises(UserError, match=r"cache /.*: shard 0: no space left .*--cache") as error:
        cache.open(0)
    assert "\n" not in str(error.value)
    assert cache.downloader.retries == 0
    assert cache.folder.count_bytes() == 0
