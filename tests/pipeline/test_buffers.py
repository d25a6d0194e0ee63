"""Buffers that are used again once nothing refers to their contents."""

import gc
import weakref

import numpy as np
import pytest
import torch

from pipeline.buffers import BufferPool


def find_memory(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_released_buffer_is_used_again_also_for_a_smaller_array() -> None:
    pool = BufferPool()
    array = pool.take(1000)
    assert array.shape == (1000,)
    assert array.dtype == np.uint8
    memory = find_memory(array)
    del array
    assert find_memory(pool.take(500)) == memory


@pytest.mark.parametrize(
    "use",
    [
        lambda array: array[100:200],
        lambda array: array[100:200][5:],
        lambda array: memoryview(array)[3:],
        lambda array: torch.from_numpy(array[100:200]),
        lambda array: np.frombuffer(array, np.uint16),
    ],
    ids=["slice", "slice of a slice", "memoryview", "tensor", "other type"],
)
def test_a_buffer_is_not_used_again_while_something_refers_to_a_part(use) -> None:
    pool = BufferPool()
    array = pool.take(1000)
    array[:] = 7
    part = use(array)
    del array
    gc.collect()
    others = [pool.take(1000) for _ in range(3)]
    for other in others:
        other[:] = 0
    assert (
        bytes(memoryview(part.numpy() if isinstance(part, torch.Tensor) else part)).strip(b"\7")
        == b""
    )


def test_arrays_that_are_alive_do_not_overlap_and_a_larger_one_gets_new_memory() -> None:
    pool = BufferPool()
    arrays = [pool.take(size) for size in (10, 1000, 10)]
    for value, array in enumerate(arrays):
        array[:] = value
    assert [set(array.tolist()) for array in arrays] == [{0}, {1}, {2}]
    arrays.clear()
    assert len(pool.take(10_000)) == 10_000


def test_a_pool_may_end_before_its_arrays() -> None:
    pool = BufferPool()
    array, ended = pool.take(1000), weakref.ref(pool)
    array[:] = 7
    del pool
    gc.collect()
    assert ended() is None
    assert set(array.tolist()) == {7}
