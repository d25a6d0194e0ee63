"""Test that results of threads arrive in order, and that their number is bounded."""

import threading

import pytest

from schemas.parallel import map_ahead


def test_results_come_in_order_and_are_bounded() -> None:
    begun: list[int] = []

    def square(item: int) -> int:
        begun.append(item)
        return item**2

    results = map_ahead(square, iter(range(1000)), 4)
    assert [next(results) for _ in range(10)] == [i**2 for i in range(10)]
    assert len(begun) <= 10 + 2 * 4
    assert list(results) == [i**2 for i in range(10, 1000)]
    assert sorted(begun) == list(range(1000))


def test_as_many_run_together_as_there_are_workers() -> None:
    """Let each call wait until all four run; running one at a time would break the barrier."""
    barrier = threading.Barrier(4, timeout=10)
    assert len(list(map_ahead(lambda item: barrier.wait(), range(8), 4))) == 8


def test_an_error_is_raised_in_order_and_ends_the_iteration() -> None:
    begun: list[int] = []

    def fail(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise KeyError(item)
        return item

    results = map_ahead(fail, range(1000), 2)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError):
        next(results)
    assert len(begun) < 20


def test_empty_input_gives_empty_output() -> None:
    assert list(map_ahead(str, [], 3)) == []
