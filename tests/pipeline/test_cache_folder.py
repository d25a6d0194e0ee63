"""The folder of the cache is bounded, evicts in order, and is shared by processes."""

import fcntl
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from bench.object_store import ObjectServer
from pipeline import cache as cache_module
from pipeline import cache_folder
from pipeline.cache import ShardCache
from pipeline.cache_folder import Part, try_lock
from pipeline.order import SampleOrder
from pipeline.shards import ShardReader
from tests.pipeline.conftest import (
    ROOM,
    SHARDS,
    Open,
    content,
    of_shard,
    present,
    sizes,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("small_reserve")


# --- bounded --------------------------------------------------------------------------------------


def room_for(open_cache: Open, shards: list[int]) -> int:
    """Return the bytes in which exactly these shards fit, including reservations."""
    by_shard = sizes(open_cache())
    return sum(by_shard[shard] for shard in shards)


def test_least_recently_used_shard_is_evicted_first(open_cache: Open) -> None:
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
    os.utime(cache.folder.path(cache.dataset.shards[4].sha256, "tar"))  # used after shard 1
    evicted = []
    for shard in range(5, 10):  # there is room for each if one other shard is evicted
        row, before = cache.dataset.shards[shard], set(present(cache))
        cache.folder.limit = cache.folder.count_bytes() + cache.estimate_bytes(row) - 1
        os.close(cache.open(shard).tar)
        cache._needed[row.sha256] = -1  # needed immediately, so that it is not evicted next
        evicted += sorted(before - set(present(cache)))
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


def test_a_reader_never_holds_more_than_its_windows(open_cache: Open) -> None:
    """Shards that the next epoch needs first are closed meanwhile, so that they can be evicted."""
    cache = open_cache(4 * max(sizes(open_cache())))
    order = SampleOrder([1] * SHARDS, batch_size=3, shuffle_shards=3)
    reader = ShardReader(cache.dataset, cache, order)
    for epoch in range(4):
        for step in range(order.steps):
            assert len(reader.read(epoch, step).keys) == 3
    reader.close()
    assert cache.folder.evicted > 0
    assert cache.folder.evicted_in_use == 0


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


def test_a_forked_process_does_not_keep_the_locks_of_its_parent(open_cache: Open) -> None:
    """It has the files, so their locks outlive the parent's closing of them."""
    cache = open_cache()
    folder, row = cache.folder, cache.dataset.shards[0]
    content(cache, 1)
    tar = folder.path(cache.dataset.shards[1].sha256, "tar")
    waits, wakes = os.pipe()

    def wait() -> None:
        os.read(waits, 1)

    def assert_unlocked(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with folder.lock():
        children = [in_child(wait)]
    with (folder.folder / "lock").open("rb") as file:
        assert_unlocked(file)
    part = folder.reserve(row, cache.estimate_bytes(row), {}, is_urgent=True)
    assert isinstance(part, Part)
    children.append(in_child(wait))
    with part.path.open("rb") as file:
        folder.abandon(part)
        assert_unlocked(file)
    with try_lock(tar):
        children.append(in_child(wait))
    with tar.open("rb") as file:
        assert_unlocked(file)
    os.write(wakes, b"123")
    assert [exit_status(child) for child in children] == [0, 0, 0]
    os.close(waits)
    os.close(wakes)


def test_a_forked_process_fetches_with_threads_of_its_own(
    server: ObjectServer, open_cache: Open
) -> None:
    gate = threading.Event()
    server.fault = of_shard(0, block_first(gate))
    cache = open_cache()
    cache.prefetch(range(SHARDS))
    wait_until(lambda: server.count_gets("000000.tar") == 1)

    def read_all() -> None:
        signal.alarm(60)  # ends it if it hangs
        cache.prefetch(range(SHARDS))
        for shard, row in enumerate(cache.dataset.shards):
            files = cache.open(shard)
            assert len(os.pread(files.tar, ROOM, 0)) == row.bytes

    child = in_child(read_all)
    gate.set()
    assert exit_status(child) == 0


def block_first(gate: threading.Event) -> Callable[[int], None]:
    """Return a fault that holds the first request until the gate opens, or for 30 s."""

    def fault(before: int) -> None:
        if before == 0:
            gate.wait(30)

    return fault


def test_a_killed_fetcher_leaves_nothing_that_harms(
    server: ObjectServer, open_cache: Open, tmp_path: Path
) -> None:
    gate = threading.Event()
    server.fault = of_shard(0, block_first(gate))
    child = in_child(lambda: os.close(open_cache().open(0).tar))
    wait_until(lambda: server.count_gets("000000.tar") == 1)
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
    server.fault = of_shard(0, block_first(gate))
    child = in_child(lambda: os.close(open_cache().open(0).tar))
    wait_until(lambda: server.count_gets("000000.tar") == 1)
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


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_copy_is_fetched_again(open_cache: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache()
    content(cache, 0)
    tar = cache.folder.path(cache.dataset.shards[0].sha256, "tar")
    with tar.open("r+b") as file:
        file.truncate(1000)
    content(cache, 0)
    idx, parquet = (
        cache.folder.path(cache.dataset.shards[0].sha256, name) for name in ("idx", "parquet")
    )
    idx.unlink()
    content(cache, 0)
    idx.write_bytes(b"")
    content(cache, 0)
    parquet.write_bytes(bytes(parquet.stat().st_size))
    content(cache, 0)
    with tar.open("r+b") as file:
        file.write(b"\1")  # as after a power failure: only the size is correct
    monkeypatch.setattr(
        cache_folder.time, "clock_gettime", lambda clock: -1.0
    )  # pretends that the machine has just booted
    content(cache, 0)
    assert cache.counts["fetched"] == 6


def test_prefetching_does_not_hide_what_a_power_failure_damaged(
    open_cache: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache()
    content(cache, 0)
    tar = cache.folder.path(cache.dataset.shards[0].sha256, "tar")
    with tar.open("r+b") as file:
        file.write(b"\1")
    status = tar.stat()
    monkeypatch.setattr(  # the machine was booted after that
        cache_folder, "is_older_than_boot", lambda now: now.st_ctime_ns <= status.st_ctime_ns
    )
    wait_until(lambda: time.time_ns() > status.st_ctime_ns + 20_000_000)  # a tick of its clock
    cache.prefetch([0])
    wait_until(lambda: cache._threads == 0)
    content(cache, 0)
    assert cache.counts["fetched"] == 2


# --- files of others ------------------------------------------------------------------------------


def test_files_that_the_cache_did_not_make_stay(open_cache: Open) -> None:
    cache = open_cache()
    names = (
        "backup.tar", "imagenet.idx", "labels.parquet", "7.part", f"{'0' * 63}g.tar",
        f"{'0' * 64}.idx.parquet",
    )  # fmt: skip
    for name in names:
        (cache.folder.folder / name).write_bytes(b"mine")
    before = cache.folder.count_bytes()
    cache.folder.limit = sum(sizes(cache)[:2])
    for shard in range(4):
        content(cache, shard)
    assert before == 0
    assert cache.folder.evicted
    assert all((cache.folder.folder / name).read_bytes() == b"mine" for name in names)
