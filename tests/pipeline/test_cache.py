"""Local copies of remote shards: whole, shared, bounded."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline import Cache, EvalViews, MaskedViews
from pipeline.cache import fetch
from schemas import ShardDataset, UserError, write_dataset
from tests.pipeline.conftest import SAMPLES, picture, sample_of, small

ROOM = 10**9


@pytest.fixture
def remote(dataset: ShardDataset, request: pytest.FixtureRequest) -> str:
    """The dataset behind a protocol that DALI does not know."""
    memory = fsspec.filesystem("memory")
    name = request.node.name.replace("[", "-").replace("]", "")
    memory.put(dataset.url, f"/{name}", recursive=True)
    return f"memory://{name}"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.tar"))


def test_a_copy_gives_the_batches_of_the_original(
    dataset: ShardDataset, remote: str, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", ROOM)
    for recipe in ("hp", "none"):
        one = MaskedViews(dataset.url, small(recipe), 8, "cpu", report=("keys",))
        other = MaskedViews(remote, small(recipe), 8, "cpu", report=("keys",), cache=cache)
        for a, b in zip(one, other, strict=True):
            assert a.sample_keys == b.sample_keys
            assert torch.equal(a.query, b.query)
        other.load_state_dict(one.state_dict())  # where shards lie does not matter
    plain = EvalViews(remote, 8, "cpu", crop_size=56, cache=cache)
    assert sum(len(batch.label) for batch in plain) == SAMPLES


def test_what_is_there_is_not_copied_again(remote: str, tmp_path: Path) -> None:
    dataset, cache = ShardDataset.open(remote), Cache(tmp_path, ROOM)
    fetch(dataset, cache)
    tars = sorted(tmp_path.rglob("*.tar"))
    assert len(tars) == len([row for row in dataset.shards if row.samples])
    before = {path: path.stat().st_mtime_ns for path in tars}
    tars[0].write_bytes(tars[0].read_bytes()[:-512])  # cut
    tars[1].unlink()  # lost
    fetch(dataset, cache)
    after = {path: path.stat().st_mtime_ns for path in tars}
    changed = [path for path in tars if before[path] != after[path]]
    assert changed == tars[:2]
    assert [path.read_bytes() for path in tars] == [
        dataset.store.read(f"shards/{path.name}") for path in tars
    ]


def test_a_shard_that_is_not_what_the_table_says_is_refused(remote: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    path = remote.replace("memory://", "/") + "/shards/000001.tar"
    content = bytearray(memory.cat_file(path))
    content[-2000] ^= 1
    memory.pipe_file(path, bytes(content))
    with pytest.raises(UserError, match="shard 1 has sha256"):
        MaskedViews(remote, small("hp"), 8, "cpu", cache=Cache(tmp_path, ROOM))
    assert "000001.tar" not in str(files(tmp_path))


def other_dataset(folder: Path, name: str, seed: int) -> ShardDataset:
    samples = [sample_of(index, picture(seed + index)) for index in range(4)]
    return write_dataset(f"memory://{folder.name}-{name}", samples, name=name)


def test_copies_that_nobody_reads_make_room_oldest_first(tmp_path: Path) -> None:
    one, two, three = (other_dataset(tmp_path, str(seed), seed) for seed in (100, 200, 300))
    sizes = [sum(row.bytes for row in each.shards) for each in (one, two, three)]
    cache = Cache(tmp_path / "cache", sum(sizes) - 1)
    for each in (one, two):
        fetch(each, cache)  # and let go of at once
        time.sleep(0.02)
    fetch(one, cache)  # used again: two is the older one now
    fetch(three, cache)
    kept = {path.parent.name for path in cache.folder.glob("*/bytes")}
    assert kept == {one.digest, three.digest}


def test_a_copy_in_use_is_never_removed(tmp_path: Path) -> None:
    one, two = (other_dataset(tmp_path, str(seed), seed) for seed in (100, 200))
    size = sum(row.bytes for row in one.shards)
    cache = Cache(tmp_path / "cache", size)
    held = fetch(one, cache)
    with pytest.raises(UserError, match=rf"other datasets in use {size}, and the limit is {size}"):
        fetch(two, dataclasses.replace(cache, limit=size))
    assert held.store.exists("shards/000000.tar")


def test_a_dataset_above_the_limit_is_refused(remote: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="and the limit is 1000; raise it"):
        MaskedViews(remote, small("hp"), 8, "cpu", cache=Cache(tmp_path, 1000))


def test_a_folder_that_cannot_be_written_is_refused(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory"):
        MaskedViews(remote, small("hp"), 8, "cpu", cache=Cache(tmp_path / "file" / "x", ROOM))


SHARE = """
import sys, time
from pathlib import Path
from pipeline import cache
from schemas import ShardDataset
slow = cache.copy_file
def copy_file(store, name, target):
    time.sleep(0.05)  # so that the processes meet
    with open(sys.argv[3], "a") as log:
        log.write(name + "\\n")
    return slow(store, name, target)
cache.copy_file = copy_file
dataset = ShardDataset.open(sys.argv[1])
cache.fetch(dataset, cache.Cache(Path(sys.argv[2]), 10**9))
print("whole")
"""


def share(dataset: ShardDataset, folder: Path, log: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SHARE, dataset.url, str(folder), str(log)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_share_a_copy_and_survive_a_kill(dataset: ShardDataset, tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    shards = [row for row in dataset.shards if row.samples]
    killed = share(dataset, folder, log)
    while not log.exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    log.write_text("")
    together = [share(dataset, folder, log) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in together] == ["whole\n"] * 4
    names = log.read_text().split()
    assert len(names) == len(set(names)), "a file was copied twice"
    for row in shards:
        name = f"shards/{row.shard:06d}.tar"
        assert (folder / dataset.digest / name).read_bytes() == dataset.store.read(name)
    assert not list(folder.rglob("*.part"))
