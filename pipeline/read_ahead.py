"""An iterator that works in a thread, a few items ahead of whoever takes them."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

BATCHES_AHEAD = 2
"""Batches that loaders read and have not yet handed to DALI."""

WAIT_SECONDS = 0.1
"""How often a full queue looks whether anybody still takes from it."""


class ReadAhead(Generic[Item]):
    """Yields what an iterator yields; an exception of the iterator reaches whoever takes.

    The thread ends with the iterator, on `close`, and when nobody holds this object any more.

    Args:
        items: is advanced in the thread only.
        depth: items that are ready and not yet taken, at most.
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
            self._queue.put((None, error))  # taking again ends alike
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait for it."""
        self._closed.set()
        self._thread.join()


def produce(items: Iterator[Item], ready: queue.Queue, closed: threading.Event) -> None:
    """Put items into the queue until they end or nobody takes them any more."""
    while not closed.is_set():
        try:
            entry: tuple[Item | None, BaseException | None] = (next(items), None)
        except BaseException as error:  # StopIteration too: whoever takes gets it
            entry = (None, error)
        while not closed.is_set():
            try:
                ready.put(entry, timeout=WAIT_SECONDS)
                break
            except queue.Full:
                continue
        if entry[1] is not None:
            return
