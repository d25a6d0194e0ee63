"""Reads that do not end: a dead NFS mount or a store gives neither bytes nor an error."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from schemas.names import to_stored

REPORT_SECONDS = 10.0
SLOW_SECONDS = 30.0
"""A read that takes longer is reported, so that a job that stands still can name the file."""


class PendingReads:
    """The inputs that are being read, and since when; used by several threads."""

    def __init__(self) -> None:
        self.begun: dict[int, tuple[str, float]] = {}
        self.lock = threading.Lock()
        self.count = 0

    @contextmanager
    def begin(self, location: str) -> Iterator[None]:
        with self.lock:
            self.count += 1
            number = self.count
            self.begun[number] = (to_stored(location), time.monotonic())
        try:
            yield
        finally:
            with self.lock:
                del self.begun[number]

    def slow(self, seconds: float) -> dict[str, float]:
        """Return the inputs that have been read for longer, and for how many seconds."""
        with self.lock:
            begun = list(self.begun.values())
        now = time.monotonic()
        return {name: now - since for name, since in begun if now - since >= seconds}


@contextmanager
def reported(reads: PendingReads, report: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Report slow reads every few seconds until the block ends; once more when there are none."""
    over = threading.Event()

    def watch() -> None:
        told = False
        while not over.wait(REPORT_SECONDS):
            slow = reads.slow(SLOW_SECONDS)
            if slow or told:
                report(slow)
            told = bool(slow)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
