"""What a person sees while the job runs: a bar on a terminal, plain lines otherwise."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0


class Ledger:
    """Counts what the workers have done, and how often each shard was begun: one actor of a job."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.counts: dict[int, tuple[int, int]] = {}

    def begin(self, shard: int) -> int:
        """The number of this attempt, from 1; what an earlier one counted is forgotten."""
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        self.counts[shard] = (0, 0)
        return self.attempts[shard]

    def advance(self, shard: int, written: int, rejected: int) -> None:
        before = self.counts[shard]
        self.counts[shard] = (before[0] + written, before[1] + rejected)

    def totals(self) -> tuple[int, int]:
        """Images written and rejected so far."""
        written, rejected = zip(*self.counts.values(), strict=True) if self.counts else ((), ())
        return sum(written), sum(rejected)


@contextmanager
def watch(ledger: Any, images: int) -> Iterator[None]:
    """Show the ledger's counts until the block ends."""
    over = threading.Event()
    show = show_bar if sys.stderr.isatty() else show_lines
    thread = threading.Thread(target=show, args=(ledger, images, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def show_bar(ledger: Any, images: int, over: threading.Event) -> None:
    with tqdm(total=images, unit="image", smoothing=0.1, dynamic_ncols=True) as bar:
        while True:
            last = over.wait(POLL_SECONDS)
            written, rejected = ray.get(ledger.totals.remote())
            bar.update(written + rejected - bar.n)
            bar.set_postfix(rejected=rejected, refresh=False)
            if last:
                return


def show_lines(ledger: Any, images: int, over: threading.Event) -> None:
    start = time.monotonic()
    while True:
        last = over.wait(LINE_SECONDS)
        written, rejected = ray.get(ledger.totals.remote())
        done, seconds = written + rejected, time.monotonic() - start
        left = tqdm.format_interval((images - done) * seconds / done) if done else "?"
        print(
            f"{done}/{images} images, {done / seconds:.1f} images/s, {rejected} rejected, "
            f"{left} left",
            flush=True,
        )
        if last:
            return
