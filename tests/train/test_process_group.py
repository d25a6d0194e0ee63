"""How the ranks of one start find each other in a store that earlier starts have used."""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from schemas import UserError
from tests.train.ranks import get_preloaded_context
from tests.train.torchrun import find_free_endpoint
from train import process_group
from train.distributed import raise_on_all_ranks
from train.process_group import (
    agree_on_start,
    exit_naming_silent_ranks,
    have_all_ranks,
    join_process_group,
    pick_device,
    rendezvous,
)

WAITS = timedelta(seconds=30)


@pytest.fixture
def server() -> dist.TCPStore:
    """Return the store that torchrun keeps over all restarts."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=WAITS)


def join(server: dist.TCPStore, number: int, size: int, waits: timedelta = WAITS) -> str:
    """Return what a rank with its own connection to the store agrees on."""
    store = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=waits)
    return agree_on_start(store, number, size, waits)


def join_all(server: dist.TCPStore, size: int) -> set[str]:
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda number: join(server, number, size), range(size)))


def test_each_start_has_its_own_name_for_all_ranks(server):
    names = [join_all(server, size) for size in (4, 2, 2, 1, 3)]  # nodes leave and come
    assert all(len(of_start) == 1 for of_start in names)
    assert len(set.union(*names)) == len(names)


@pytest.mark.parametrize("gpus", [(True, True, True), (True, False, True), (False,)])
def test_ranks_agree_whether_each_has_a_gpu(server, gpus):
    def answer(has: bool) -> bool:
        store = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=WAITS)
        return have_all_ranks(store, len(gpus), has)

    with ThreadPoolExecutor(len(gpus)) as pool:
        assert set(pool.map(answer, gpus)) == {all(gpus)}


def join_and_pick_device(rank: int, port: int, connection: Connection) -> None:
    """Join as one of two ranks of a machine with one GPU; send the backend and the error."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda device: None
    process_group.parse_device = lambda name: torch.device("cpu")
    process_group.exit_with_parent = lambda: None
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        **{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    try:
        with join_process_group(timeout=60), raise_on_all_ranks():
            pick_device("auto")
    except (UserError, SystemExit) as error:
        connection.send((dist.get_backend(), str(error)))


@pytest.mark.slow
def test_a_process_too_many_for_the_gpus_is_named_and_none_waits_for_nccl():
    context = get_preloaded_context()
    pipes = [context.Pipe() for _ in range(2)]
    port = int(find_free_endpoint().split(":")[1])
    for rank, (_, theirs) in enumerate(pipes):
        context.Process(target=join_and_pick_device, args=(rank, port, theirs)).start()
        theirs.close()
    answers = [ours.recv() for ours, _ in pipes]
    refusal = (
        "rank 1: local rank 1 has no GPU: this machine has 1; start no more processes than GPUs"
    )
    assert answers == [("gloo", refusal), ("gloo", "2")]


@pytest.mark.slow
def test_a_request_of_a_dead_rank_does_not_count_as_its_successors(server):
    """Rank 1 dies after its question; a start with another rank 1 waits for that one."""
    short = timedelta(seconds=1)
    with pytest.raises(dist.DistError, match="rank 0 of 2 did not come within 1 s"):
        join(server, 1, 2, short)
    with pytest.raises(dist.DistError, match=r"rank 1 of 2 did not come within 1 s"):
        join(server, 0, 2, short)
    assert len(join_all(server, 2)) == 1


@pytest.mark.slow
def test_an_absent_rank_is_named(server):
    with ThreadPoolExecutor() as pool:
        pool.submit(join, server, 1, 4)
        with pytest.raises(dist.DistError, match="rank 2, 3 of 4 did not come"):
            join(server, 0, 4, timedelta(seconds=3))


class CountingStore:
    """The part of a store that `exit_naming_silent_ranks` uses; counts its requests."""

    def __init__(self, alive: set[int]):
        self.alive, self.requests = alive, 0

    def set(self, key: str, value: str) -> None:
        self.alive.add(int(key))

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return int(keys[0]) in self.alive


def test_only_the_lowest_live_rank_asks_for_all_others(monkeypatch):
    """With 1,000 ranks a million requests would keep the store busy for a minute."""
    monkeypatch.setattr(process_group, "GRACE", 0.0)
    alive = set(range(1000)) - {0, 7}
    other, lowest = CountingStore(alive), CountingStore(alive)
    with pytest.raises(SystemExit) as left:
        exit_naming_silent_ranks(other, 500, 1000, 4, RuntimeError("gloo"))
    assert left.value.code == 2
    assert other.requests == 2
    with pytest.raises(UserError, match=r"^rank 0, 7 of 1000 processes died or was silent for 4 s"):
        exit_naming_silent_ranks(lowest, 1, 1000, 4, RuntimeError("gloo"))


def test_a_store_that_died_with_its_machine_is_named(monkeypatch):
    monkeypatch.setattr(process_group, "GRACE", 0.0)
    store = Mock()
    store.check.side_effect = dist.DistNetworkError("Broken pipe")
    with pytest.raises(UserError, match=r"the machine of rank 0 or its torchrun, .* not answer"):
        exit_naming_silent_ranks(store, 1, 2, 4, RuntimeError("gloo"))


def test_a_rank_that_torchrun_has_not_started_is_told_so(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^RANK is set, .* WORLD_SIZE expected.* unset RANK"):
        rendezvous(WAITS)
