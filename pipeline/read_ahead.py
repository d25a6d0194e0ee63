"""An iterator that prefetches items in a thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

BATCHES_AHEAD = 2
"""Batches that loaders read ahead of DALI."""

WAIT_SECONDS = 0.1
"""Seconds between two checks whether the consumer of a full queue still exists."""


class ReadAhead(Generic[Item]):
    """Yields the items of an iterator, prefetched in a thread, and raises its exceptions.

    The thread ends with the iterator, on `close`, and when this object is garbage-collected.

    Args:
        items: an iterator that only the thread advances.
        depth: maximum number of items that wait to be taken.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=produce, args=(items, self._queue, self._closed), name="read-ahead", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._closed.set)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # the next call raises it again
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closed.set()
        self._thread.join()


def produce(items: Iterator[Item], ready: queue.Queue, closed: threading.Event) -> None:
    """Put items into the queue until they end or the consumer is gone."""
    while not closed.is_set():
        try:
            entry: tuple[Item | None, BaseException | None] = (next(items), None)
        except BaseException as error:  # including StopIteration: the consumer raises it
            entry = (None, error)
        while not closed.is_set():
            try:
                ready.put(entry, timeout=WAIT_SECONDS)
                break
            except queue.Full:
                continue
        if entry[1] is not None:
            return
