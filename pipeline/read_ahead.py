"""An iterator that prefetches items in a thread."""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

BATCHES_AHEAD = 2
"""Batches that loaders read ahead of DALI."""

WAIT_SECONDS = 0.1
"""Seconds between two checks whether the consumer of a full queue still exists."""

EXIT_SECONDS = 5.0
"""Longest time that the end of the process waits for the threads, which finish the item that they
are at (our choice). A store or a file system that does not answer may hold a thread for longer."""


class Producer(threading.Thread):
    """The thread of a `ReadAhead`.

    Attributes:
        closed: ends the thread, after the item that it is at.
    """

    def __init__(self, items: Iterator[Item], ready: queue.Queue) -> None:
        self.closed = threading.Event()
        arguments = items, ready, self.closed
        super().__init__(target=produce, args=arguments, name="read-ahead", daemon=True)


@atexit.register
def end_threads() -> None:
    """End all threads before Python ends.

    PyTorch and DALI abort the process when one of their functions returns to a thread of a Python
    that has ended already.
    """
    threads = [thread for thread in threading.enumerate() if isinstance(thread, Producer)]
    for thread in threads:
        thread.closed.set()
    end = time.monotonic() + EXIT_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


class ReadAhead(Generic[Item]):
    """Yields the items of an iterator, prefetched in a thread, and raises its exceptions.

    The thread ends with the iterator, on `close`, when this object is garbage-collected, and with
    the process.

    Args:
        items: an iterator that only the thread advances.
        depth: maximum number of items that wait to be taken.
    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._thread = Producer(items, self._queue)
        self._thread.start()
        # it does not wait for the thread, which may be the one that collects garbage
        weakref.finalize(self, self._thread.closed.set)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, StopIteration()))  # for the next call: nothing follows
            try:
                raise error
            finally:
                del error  # the error's traceback keeps this frame, which must not keep the error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait for it."""
        self._thread.closed.set()
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
        is_last = entry[1] is not None
        del entry  # as in `__next__`
        if is_last:
            return
