"""Report reads that hang: a dead NFS mount or object store may give neither bytes nor an error."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from precompute.background import run_in_background
from schemas.names import to_stored

REPORT_SECONDS = 10.0
SLOW_SECONDS = 30.0
"""Reads that take longer are reported, so that a stalled job can name the files it waits for."""


class PendingReads:
    """Tracks the inputs that are being read, each with its start time; safe for several threads."""

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
        """Return the reads that have taken longer than this: their seconds so far, by input."""
        with self.lock:
            begun = list(self.begun.values())
        now = time.monotonic()
        return {name: now - since for name, since in begun if now - since >= seconds}


def report_slow_reads(
    reads: PendingReads, report: Callable[[dict[str, float]], None]
) -> AbstractContextManager[None]:
    """Report slow reads every few seconds until the block ends, and once more when none is left."""

    def watch(stop: threading.Event) -> None:
        was_slow = False
        while not stop.wait(REPORT_SECONDS):
            slow = reads.slow(SLOW_SECONDS)
            if slow or was_slow:
                report(slow)
            was_slow = bool(slow)

    return run_in_background(watch)
