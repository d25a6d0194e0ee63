"""Threads of a worker."""

from collections.abc import Iterator

import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch

from precompute.threads import use_threads


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads(), ndd.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    ndd.set_num_threads(before[1])


@pytest.mark.parametrize(("device", "of_torch"), [("cpu", 3), ("cuda", 1)])
def test_a_worker_on_a_gpu_leaves_torch_one_thread(device: str, of_torch: int) -> None:
    use_threads(3, device)
    assert torch.get_num_threads() == of_torch
    assert ndd.get_num_threads() == 3
