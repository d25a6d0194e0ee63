"""The cache of remote shards is bounded, prefetches, is shared by processes and survives faults."""

import errno
import fcntl
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from bench.object_store import ObjectServer
from pipeline import EvalViews, MaskedViews, cache_folder
from pipeline import cache as cache_module
from pipeline.cache import Cache, ShardCache, find_default_folder, open_folder
from schemas import ShardDataset, UserError, write_dataset
from schemas.tables import shard_name
from tests.pipeline.conftest import picture, sample_of, small

SHARDS = 12
ROOM = 10**9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `b` of 12 shards of one sample, which tests must not modify."""
    folder = tmp_path_factory.mktemp("store")
    samples = [sample_of(index, picture(index)) for index in range(SHARDS)]
    write_dataset(folder / "b", samples, name="test", classes=["a"] * 12, shard_samples=1)
    return folder


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserve only slightly more than the indices and tables of these small shards take."""
    monkeypatch.setattr(cache_module, "SIDE_BYTES", 128)


@pytest.fixture
def server(store: Path) -> Iterator[ObjectServer]:
    with ObjectServer(store) as server:
        yield server


Open = Callable[..., ShardCache]


@pytest.fixture
def open_cache(server: ObjectServer, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a cache of the served dataset, with very short retry delays."""
    opened: list[ShardCache] = []

    def open_(limit: int = ROOM, **options: object) -> ShardCache:
        dataset = ShardDataset.open(f"{server.url}/b")
        options = {"backoff": 0.001, **options}
        opened.append(ShardCache(dataset, Cache(tmp_path / "cache", limit), **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for cache in opened:
        cache.close()


def content(cache: ShardCache, shard: int) -> bytes:
    """Open a shard, compare its three files with the dataset's and close it; return the tar."""
    files = cache.open(shard)
    try:
        tar = os.pread(files.tar, ROOM, 0)
    finally:
        os.close(files.tar)
    read = cache.dataset.store.read
    actual = (tar, files.idx, files.parquet)
    assert actual == tuple(read(shard_name(shard, name)) for name in ("tar", "idx", "parquet"))
    return tar


def present(cache: ShardCache) -> list[int]:
    """Return the numbers of the shards in the folder, in ascending order."""
    return [row.shard for row in cache.dataset.shards if cache.folder.is_present(row)]


def wait_until(is_so: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def of_shard(number: int, fault: Callable[[int], str | None]) -> Callable[[str, int], str | None]:
    """Return a fault of one tar that depends on the number of earlier requests for it."""
    return lambda path, before: fault(before) if path.endswith(f"{number:06d}.tar") else None


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


# --- prefetching ----------------------------------------------------------------------------------


def test_shards_are_fetched_in_order_several_at_a_time(
    server: ObjectServer, open_cache: Open
) -> None:
    meet, order = threading.Barrier(4), []

    def fault(path: str, before: int) -> None:
        if path.endswith(".tar"):
            order.append(int(path[-10:-4]))
            meet.wait(10)  # raises unless four requests run concurrently

    server.fault = fault
    cache = open_cache()
    cache.prefetch(needed := [7, 3, 0, 9, 1, 2, 11, 4])
    wait_until(lambda: present(cache) == sorted(needed))
    assert not meet.broken
    assert sorted(order) == sorted(needed)
    assert server.gets(".tar") == len(needed)


def test_a_new_list_replaces_the_earlier_one(server: ObjectServer, open_cache: Open) -> None:
    gate = threading.Event()
    cache = open_cache()
    server.fault = lambda path, before: None if gate.wait(20) else "500"
    cache.prefetch(range(10))
    wait_until(lambda: server.gets(".idx") == cache_module.CONCURRENT_FETCHES)
    cache.prefetch([11])
    gate.set()
    wait_until(lambda: cache._threads == 0)
    assert present(cache) == [*range(cache_module.CONCURRENT_FETCHES), 11]


def test_what_is_there_is_not_fetched_again(server: ObjectServer, open_cache: Open) -> None:
    for _ in range(2):  # two epochs of two trainings
        cache = open_cache()
        cache.prefetch(range(SHARDS))
        for shard in range(SHARDS):
            content(cache, shard)
    assert cache.counts == {"found": SHARDS}
    dataset_reads = 2 + 1  # by `content`, and by the first cache
    assert server.gets(".tar") == dataset_reads * SHARDS


def test_an_abandoned_cache_ends_its_threads(server: ObjectServer, open_cache: Open) -> None:
    open_ = open_cache()
    limit = max(sizes(open_))
    cache = ShardCache(open_.dataset, Cache(open_.folder.folder, limit))
    largest = sizes(open_).index(limit)
    files = cache.open(largest)  # in use, so there is no room for another shard
    cache.prefetch([shard for shard in range(SHARDS) if shard != largest])
    threads = [thread for thread in threading.enumerate() if thread.name == "fetch"]
    assert len(threads) == cache_module.CONCURRENT_FETCHES
    time.sleep(2 * cache_module.POLL_SECONDS)
    assert all(thread.is_alive() for thread in threads)
    del cache
    wait_until(lambda: not any(thread.is_alive() for thread in threads))
    os.close(files.tar)


EXIT = """
import sys, types
package = types.ModuleType("pipeline")  # without importing torch and DALI, which takes seconds
package.__path__ = ["pipeline"]
sys.modules["pipeline"] = package
from pathlib import Path
from pipeline.cache import Cache, ShardCache
from schemas import ShardDataset
cache = ShardCache(ShardDataset.open(sys.argv[1]), Cache(Path(sys.argv[2]), 10**9))
cache.prefetch(range(12))
print("ends")
"""


def test_threads_do_not_keep_the_process_from_exiting(server: ObjectServer, tmp_path: Path) -> None:
    gate = threading.Event()
    server.fault = lambda path, before: gate.wait(60) and None if path.endswith(".idx") else None
    done = subprocess.run(
        [sys.executable, "-c", EXIT, f"{server.url}/b", str(tmp_path)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    gate.set()
    assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")


# --- bounded --------------------------------------------------------------------------------------


def sizes(cache: ShardCache) -> list[int]:
    return [cache.estimate_bytes(row) for row in cache.dataset.shards]


def room_for(open_cache: Open, shards: list[int]) -> int:
    """Return the bytes in which exactly these shards fit, including reservations."""
    by_shard = sizes(open_cache())
    return sum(by_shard[shard] for shard in shards)


def test_the_one_used_longest_ago_is_evicted_first(open_cache: Open) -> None:
    cache = open_cache()
    for shard in (0, 1, 2, 0):  # now shard 1 is the least recently used
        content(cache, shard)
    cache.folder.limit = (
        cache.folder.count_bytes() + cache.estimate_bytes(cache.dataset.shards[3]) - 1
    )
    content(cache, 3)
    assert present(cache) == [0, 2, 3]


def test_a_shard_that_is_needed_soon_is_evicted_last(open_cache: Open) -> None:
    cache = open_cache()
    for shard in (0, 1, 2, 3, 4):
        content(cache, shard)
    cache.prefetch([0, 3, 2])  # all are present; 1 and 4, used later than 0, are not needed
    wait_until(lambda: cache._threads == 0)
    evicted = []
    for shard in (
        5,
        6,
        7,
        8,
        9,
    ):  # each replaces an unneeded shard, and later ones replace the shard before
        before = present(cache)
        cache.folder.limit = (
            cache.folder.count_bytes() + cache.estimate_bytes(cache.dataset.shards[shard]) - 1
        )
        os.utime(cache.folder.path(cache.dataset.shards[4].sha256, "tar")) if shard == 5 else None
        os.close(cache.open(shard).tar)
        cache._needed[cache.dataset.shards[shard].sha256] = -1  # needed immediately
        evicted += sorted(set(before) - set(present(cache)))
    assert evicted == [1, 4, 2, 3, 0]


def test_prefetching_evicts_nothing_that_is_needed_sooner_or_in_use(open_cache: Open) -> None:
    cache = open_cache(room_for(open_cache, [0, 1, 2]))
    files = cache.open(0)
    cache.prefetch([1, 2, 3, 4])
    wait_until(lambda: {1, 2} <= set(present(cache)))
    time.sleep(3 * cache_module.POLL_SECONDS)
    assert present(cache) == [0, 1, 2]
    os.close(files.tar)  # now shard 0 may be evicted
    wait_until(lambda: 3 in present(cache))
    assert {1, 2} <= set(present(cache))


def test_an_urgent_shard_evicts_even_what_is_in_use_which_stays_readable(
    open_cache: Open, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(max(sizes(open_cache())))
    with caplog.at_level(logging.WARNING):
        opened = [cache.open(shard) for shard in range(SHARDS)]
    assert cache.folder.count_bytes() <= cache.folder.limit
    assert cache.folder.evicted_in_use > 0
    assert sum("open at once" in record.message for record in caplog.records) == 1
    for row, files in zip(cache.dataset.shards, opened, strict=True):
        assert len(os.pread(files.tar, ROOM, 0)) == row.bytes
        os.close(files.tar)


def test_a_dataset_ten_times_the_cache_is_read_to_its_end(open_cache: Open) -> None:
    total = sum(sizes(open_cache()))
    cache = open_cache(max(total // 10, *sizes(open_cache())))
    for epoch in range(2):
        order = random.Random(epoch).sample(range(SHARDS), SHARDS)
        cache.prefetch(order)
        for shard in order:
            content(cache, shard)
    assert cache.folder.evicted > 0


def test_the_limit_is_never_exceeded(open_cache: Open, server: ObjectServer) -> None:
    """Two caches of one folder run random operations while a thread watches its size."""
    limit = 3 * max(sizes(open_cache()))
    caches = [open_cache(limit), open_cache(limit)]
    folder, most, is_over = caches[0].folder.folder, [0], threading.Event()

    def size_of(entry: os.DirEntry) -> int:
        try:
            return entry.stat().st_size
        except FileNotFoundError:
            return 0

    def watch() -> None:
        while not is_over.is_set():
            with caches[0].folder.lock(), os.scandir(folder) as entries:
                most[0] = max(most[0], sum(map(size_of, entries)))
            time.sleep(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    failures: list[BaseException] = []

    def use(cache: ShardCache, seed: int) -> None:
        draw, held = random.Random(seed), []
        try:
            for _ in range(40):
                action = draw.random()
                if action < 0.3:
                    cache.prefetch(draw.sample(range(SHARDS), draw.randint(0, 6)))
                elif action < 0.8:
                    held.append(cache.open(draw.randrange(SHARDS)))
                elif held:
                    os.close(held.pop(draw.randrange(len(held))).tar)
        except BaseException as error:
            failures.append(error)
        for files in held:
            os.close(files.tar)

    users = [threading.Thread(target=use, args=pair) for pair in zip(caches, (1, 2), strict=True)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    is_over.set()
    watcher.join()
    assert failures == []
    assert limit / 2 < most[0] <= limit


def test_an_index_above_what_was_reserved_for_it_is_counted(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "SIDE_BYTES", 0)
    cache = open_cache()
    content(cache, 0)
    row = cache.dataset.shards[0]
    assert row.bytes < cache.folder.count_bytes() == cache.estimate_bytes(row)


def test_a_shard_above_the_limit_is_refused(open_cache: Open) -> None:
    cache = open_cache(1000)
    with pytest.raises(UserError, match=r"too small: shard 3 of http.* can take .*--cache-gb"):
        cache.open(3)


def test_a_window_above_the_limit_is_refused_with_what_it_takes(open_cache: Open) -> None:
    largest = sorted(sizes(open_cache()))[-3:]
    cache = open_cache(sum(largest) - 1)
    cache.require(2)
    with pytest.raises(UserError, match=rf"3 shards open at once .* \({sum(largest)} bytes\)"):
        cache.require(3)


# --- shared by processes --------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Run a function in a forked process that exits with 0, or 1 on error; return its id."""
    if process := os.fork():
        return process
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"child: {error!r}\n".encode())
        os._exit(1)


def exit_status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("is_ahead", [True, False])
def test_processes_of_a_host_fetch_a_shard_once(
    is_ahead: bool, server: ObjectServer, open_cache: Open
) -> None:
    server.latency = 0.01  # long enough for the fetches to overlap

    def read_all() -> None:
        cache = open_cache()
        cache.prefetch(range(SHARDS) if is_ahead else [])
        for shard, row in enumerate(cache.dataset.shards):
            files = cache.open(shard)
            assert len(os.pread(files.tar, ROOM, 0)) == row.bytes

    children = [in_child(read_all) for _ in range(3)]
    assert [exit_status(child) for child in children] == [0, 0, 0]
    for suffix in (".tar", "0.idx", "0.parquet"):
        assert {n for (_, path), n in server.requests.items() if path.endswith(suffix)} == {1}


def test_a_killed_fetcher_leaves_nothing_that_harms(
    server: ObjectServer, open_cache: Open, tmp_path: Path
) -> None:
    gate = threading.Event()
    server.fault = of_shard(0, lambda before: gate.wait(30) and None if before == 0 else None)
    child = in_child(lambda: os.close(open_cache().open(0).tar))
    wait_until(lambda: server.gets("000000.tar") == 1)
    folder = tmp_path / "cache"
    assert [path.suffix for path in folder.glob("*.*")] == [".part"]
    os.kill(child, signal.SIGKILL)
    assert exit_status(child) == -signal.SIGKILL
    (folder / f"{'0' * 64}.idx").write_bytes(b"killed while it evicted")
    cache = open_cache()
    assert cache.folder.count_bytes() == 0
    assert [path.name for path in folder.iterdir()] == ["lock"]
    content(cache, 0)
    gate.set()


def test_one_that_waits_takes_over_from_a_killed_fetcher(
    server: ObjectServer, open_cache: Open
) -> None:
    gate = threading.Event()
    server.fault = of_shard(0, lambda before: gate.wait(30) and None if before == 0 else None)
    child = in_child(lambda: os.close(open_cache().open(0).tar))
    wait_until(lambda: server.gets("000000.tar") == 1)
    cache, lengths = open_cache(), []
    waiter = threading.Thread(target=lambda: lengths.append(len(content(cache, 0))))
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    os.kill(child, signal.SIGKILL)
    exit_status(child)
    waiter.join(20)
    assert lengths == [cache.dataset.shards[0].bytes]
    gate.set()


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


REASONS = {
    "500": "Internal Server Error",
    "503": "Service Unavailable",
    "cut": "payload is not completed",
    "short": "bytes came, the table says",
    "wrong": r"its sha256 is \w{64}, the table says \w{64}; `python -m schemas verify",
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
    assert server.gets("000002.tar") == 3
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
    assert server.gets(f"000005.{suffix}") == 1


def test_a_refusal_is_not_tried_again(server: ObjectServer, open_cache: Open) -> None:
    server.fault = of_shard(5, lambda before: "403")
    cache = open_cache()
    with pytest.raises(UserError, match="shard 5 is refused: 403"):
        cache.open(5)
    assert server.gets("000005.tar") == 1


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


def test_a_defect_in_a_thread_reaches_whoever_opens_the_shard(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()

    def download(*_: object) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr(cache.downloader, "download", download)
    cache.prefetch([3])
    wait_until(lambda: cache._threads == 0)
    monkeypatch.undo()
    with pytest.raises(TypeError, match="a defect"):
        cache.open(3)


def test_a_tar_larger_than_the_table_says_is_not_written_whole(
    open_cache: Open,
) -> None:
    cache = open_cache(attempts=1)
    row = cache.dataset.shards[3]
    cache._rows[3] = row._replace(bytes=1000)
    with pytest.raises(UserError, match="more than the 1000 bytes that the table says came"):
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


def test_a_damaged_copy_is_fetched_again(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache()
    content(cache, 0)
    tar = cache.folder.path(cache.dataset.shards[0].sha256, "tar")
    with tar.open("r+b") as file:
        file.truncate(1000)
    content(cache, 0)
    cache.folder.path(cache.dataset.shards[0].sha256, "idx").unlink()
    content(cache, 0)
    with tar.open("r+b") as file:
        file.write(b"\1")  # as after a power failure: only the size is correct
    monkeypatch.setattr(
        cache_folder.time, "clock_gettime", lambda clock: -1.0
    )  # pretends that the machine has just booted
    content(cache, 0)
    assert cache.counts["fetched"] == 4


def test_a_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/x: cannot be used \(Not a directory\).*--cache"):
        open_folder(Cache(tmp_path / "file" / "x", ROOM))
    with pytest.raises(UserError, match="its limit is 0 bytes"):
        open_folder(Cache(tmp_path, 0))

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="No locks available"):
        open_folder(Cache(tmp_path, ROOM))


def test_a_folder_on_nfs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/a {tmp_path}/nfs nfs4 rw 0 0\n")
    monkeypatch.setattr(cache_module, "MOUNTS", mounts)
    with pytest.raises(UserError, match="is on nfs4, a network file system"):
        open_folder(Cache(tmp_path / "nfs" / "cache", ROOM))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nfs"))
    monkeypatch.setattr(cache_module.tempfile, "tempdir", str(tmp_path))
    assert find_default_folder() == tmp_path / f"saliency-shards-{os.getuid()}"


def test_the_default_is_stated(
    server: ObjectServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        cache = ShardCache(ShardDataset.open(f"{server.url}/b"), Cache())
    limit = cache.folder.limit
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    assert 0.4 * free < limit < 0.6 * free
    stated = f"kept in {tmp_path}/saliency-shards, at most {limit / 1e9:.3g} GB"
    assert stated in cache.description
    assert stated in caplog.text


# --- through the loader ---------------------------------------------------------------------------


def test_a_remote_dataset_gives_the_batches_of_the_same_shards_on_disk(
    server: ObjectServer, store: Path, tmp_path: Path
) -> None:
    limit = 6 * 10**5  # less than the dataset
    cache = Cache(tmp_path, limit)
    assert sum(row.bytes for row in ShardDataset.open(store / "b").shards) > limit / 2
    options: dict = {"report": ("keys",), "seed": 3, "shuffle_shards": 2}
    local = MaskedViews(store / "b", small("hp"), 4, "cpu", **options)
    remote = MaskedViews(f"{server.url}/b", small("hp"), 4, "cpu", cache=cache, **options)
    for ours, theirs in zip(remote, local, strict=True):
        assert ours.sample_keys == theirs.sample_keys
        assert torch.equal(ours.query, theirs.query)
    plain = EvalViews(f"{server.url}/b", 4, "cpu", crop_size=56, cache=cache)
    assert sum(len(batch.label) for batch in plain) == SHARDS
    with pytest.raises(UserError, match="4 shards open at once"):
        MaskedViews(
            f"{server.url}/b",
            small("hp"),
            4,
            "cpu",
            cache=Cache(tmp_path, limit // 6),
            shuffle_shards=4,
        )
