"""The queue of MoCo and MaskCo against a list: length, wraps, invalid keys, ranks."""

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from tests.train.ranks import random_batch
from train.distributed import rank
from train.methods import MoCoConfig, Setup
from train.methods.momentum import replace_first_rows


def queue_of(length: int):
    """Build a method whose queue rows start with 0, -1, -2, ..., to identify them."""
    setup = Setup(encoder="tiny", batch_size=1)
    method = MoCoConfig(queue=length, projection=2).build(setup)
    method.queue.copy_(-torch.arange(length)[:, None].float().expand(-1, 2))
    return method


def keys_of(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)[:, None].float().expand(-1, 2)


@pytest.mark.parametrize("length", [1, 5, 8, 13])
def test_only_valid_keys_are_queued_in_their_order(length):
    """A step may have more valid keys than the queue has rows, or none."""
    method, generator = queue_of(length), torch.Generator().manual_seed(length)
    expected, place = method.queue[:, 0].tolist(), 0
    for step in range(12):
        new_keys: list[float] = []
        for part in range(2):
            keys = keys_of(1 + 100 * step + 10 * part, 8)
            valid = torch.rand(8, generator=generator) < (0, 0.3, 0.7, 1)[step % 4]
            method.remember(keys, valid)
            new_keys += keys[valid][:, 0].tolist()
        for key in new_keys[-length:]:
            expected[place] = key
            place = (place + 1) % length
        method.end_step()
        assert method.queue[:, 0].tolist() == expected
        assert method.queue_next == place
    assert method.new_keys == []


def test_all_valid_equals_no_mask():
    told, untold = queue_of(7), queue_of(7)
    for step in range(5):
        keys = keys_of(1 + 10 * step, 4)
        told.remember(keys, torch.ones(4, dtype=torch.bool))
        untold.remember(keys)
        for method in (told, untold):
            method.end_step()
        assert torch.equal(told.queue, untold.queue)
        assert told.queue_next == untold.queue_next


VALID = [[True, False, True], [False, False, False], [False, True, True], [True, False, False]]


def queued_by_ranks():
    """Make two steps on this rank; in each, one rank may have no valid key."""
    method = queue_of(4)
    for step in range(2):
        row = 2 * step + rank()
        method.remember(keys_of(1 + 10 * row, 3), torch.tensor(VALID[row]))
        method.end_step()
    return method.queue[:, 0].tolist(), method.queue_next.item()


def test_ranks_with_unequal_numbers_of_valid_keys_queue_the_same(two_ranks):
    for queue, place in two_ranks(queued_by_ranks):
        assert queue == [31, 3, 22, 23]
        assert place == 1


def queued_in_parts():
    """Make a step of eight keys, which this rank gets in two micro-batches."""
    method = queue_of(9)
    for first in (1, 3):
        method.remember(keys_of(first + 4 * rank(), 2))
    method.end_step()
    return method.queue[:, 0].tolist()


def test_keys_are_queued_in_the_order_of_the_global_batch(two_ranks):
    """So the next step overwrites the same keys, on any number of ranks and of micro-batches."""
    assert two_ranks(queued_in_parts) == [[1, 2, 3, 4, 5, 6, 7, 8, -8]] * 2


@pytest.mark.parametrize("length", [64, 5])
def test_the_host_never_waits_for_the_number_of_valid_keys(length):
    """Fake tensors have no values: reading one fails, which on a GPU would be a wait."""
    method, mode = queue_of(length), FakeTensorMode()
    method.queue, method.queue_next = map(mode.from_tensor, (method.queue, method.queue_next))
    with mode:
        keys, valid = torch.ones(12, 2), torch.ones(12, dtype=torch.bool)
        method.remember(keys, valid)
        method.end_step()
        with pytest.raises(DynamicOutputShapeException):
            keys[valid]
        with pytest.raises(DataDependentOutputException):
            valid.sum().item()


def test_replacing_rows_does_not_change_the_arguments():
    rows, keys = keys_of(0, 2).clone(), keys_of(10, 3)
    new, count = replace_first_rows(rows, keys, torch.tensor([False, False, True]))
    assert new[:, 0].tolist() == [12, 1]
    assert count == 1
    assert torch.equal(rows, keys_of(0, 2))


def test_moco_queues_every_key():
    method = queue_of(7)
    batch = random_batch(4, hard_negatives=1)
    method(batch)
    ((keys, valid),) = method.new_keys
    assert valid is None
    method.end_step()
    assert torch.equal(method.queue[:4], keys)
    assert method.queue_next == 4
