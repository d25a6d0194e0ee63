"""How the ranks of one start find each other in a store that earlier starts have used."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from train.process_group import agree_on_start

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
