"""Run a function over many items in threads, with a bounded number of results in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield `function(item)` for each item, in the order of the items.

    At most `2 * workers` calls are running, or finished and not yet yielded, so that memory does
    not grow with the number of items. (`ThreadPoolExecutor.map` submits all of them at once.)

    Args:
        workers: number of threads. For requests to an object store it may exceed the CPU cores.

    Raises:
        Exception: the first exception of the function, in the order of the items; calls that have
            not begun by then are canceled.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
