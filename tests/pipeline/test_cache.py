"""The cache of remote shards prefetches, refuses what does not fit, and feeds the loader."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.object_store import ObjectServer
from pipeline import EvalViews, MaskedViews
from pipeline import cache as cache_module
from pipeline.cache import Cache, ShardCache, find_default_folder, open_folder
from schemas import ShardDataset, UserError
from tests.pipeline.conftest import (
    ROOM,
    SHARDS,
    Open,
    content,
    interrupt_next,
    present,
    sizes,
    small,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("small_reserve")


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
    assert server.count_gets(".tar") == len(needed)


def test_a_new_list_replaces_the_earlier_one(server: ObjectServer, open_cache: Open) -> None:
    gate = threading.Event()
    cache = open_cache()
    server.fault = lambda path, before: None if gate.wait(20) else "500"
    cache.prefetch(range(10))
    wait_until(lambda: server.count_gets(".idx") == cache_module.CONCURRENT_FETCHES)
    cache.prefetch([11])
    gate.set()
    wait_until(lambda: cache._threads == 0)
    assert present(cache) == [*range(cache_module.CONCURRENT_FETCHES), 11]


def test_a_closed_loader_fetches_no_more(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CONCURRENT_FETCHES", 1)
    views = MaskedViews(
        f"{server.url}/b", small("mean"), 1, "cpu", cache=Cache(tmp_path / "c", ROOM),
        shuffle_shards=4,
    )  # fmt: skip
    server.latency = 0.05
    next(iter(views))  # announces all shards
    views.close()
    source = views._source
    assert isinstance(source, ShardCache)
    wait_until(lambda: source._threads == 0)
    assert source.counts["fetched"] < SHARDS


def test_what_is_there_is_not_fetched_again(server: ObjectServer, open_cache: Open) -> None:
    for _ in range(2):  # two epochs of two trainings
        cache = open_cache()
        cache.prefetch(range(SHARDS))
        for shard in range(SHARDS):
            content(cache, shard)
    assert cache.counts == {"found": SHARDS}
    dataset_reads = 2 + 1  # by `content`, and by the first cache
    assert server.count_gets(".tar") == dataset_reads * SHARDS


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


# --- what fits ------------------------------------------------------------------------------------


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


# --- the folder -----------------------------------------------------------------------------------


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
    monkeypatch.setattr("pipeline.mounts.MOUNTS", mounts)
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


def test_an_interrupted_iteration_does_not_clear_the_list_of_the_next_one(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict = {"shuffle_shards": 1, "cache": Cache(tmp_path, ROOM)}
    views = MaskedViews(f"{server.url}/b", small("mean"), 1, "cpu", **options)
    announced = []
    monkeypatch.setattr(views._source, "prefetch", announced.append)
    next(iter(views))
    assert views._batches is not None
    thread = views._batches._ahead._thread
    interrupt_next(views, monkeypatch)
    next(iter(views))
    thread.join()
    assert all(announced)
    views.close()
    assert announced[-1] == ()


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
