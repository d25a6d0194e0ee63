"""Actors that count what a job has done so far.

Alone in their file: an actor's process need not import torch and DALI.
"""

import time


class ProgressActor:
    """Counts what the workers have done, and how often each shard was begun: one actor of a job."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.counts: dict[int, tuple[int, int]] = {}
        self.begun: dict[int, float] = {}
        self.reads: dict[int, dict[str, float]] = {}
        self.first = self.last = time.monotonic()

    def begin(self, shard: int) -> int:
        """The number of this attempt, from 1; what an earlier one counted is forgotten."""
        if not self.attempts:
            self.first = time.monotonic()
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        self.counts[shard] = (0, 0)
        self.reads.pop(shard, None)
        self.begun[shard] = time.monotonic()
        return self.attempts[shard]

    def advance(self, shard: int, written: int, rejected: int) -> None:
        before = self.counts[shard]
        self.counts[shard] = (before[0] + written, before[1] + rejected)

    def report_reads(self, shard: int, slow: dict[str, float]) -> None:
        """Keep which inputs of a shard have been read for long, and for how many seconds."""
        self.reads[shard] = slow

    def slow_reads(self) -> dict[str, float]:
        return {name: seconds for slow in self.reads.values() for name, seconds in slow.items()}

    def finish(self, shard: int) -> None:
        self.reads.pop(shard, None)
        del self.begun[shard]
        self.last = time.monotonic()

    def at_work(self) -> float:
        """Seconds from the first shard's begin to the last one's end."""
        return self.last - self.first

    def totals(self) -> tuple[int, int, int]:
        """Images written, images rejected and shards finished so far."""
        written, rejected = zip(*self.counts.values(), strict=True) if self.counts else ((), ())
        return sum(written), sum(rejected), len(self.counts) - len(self.begun)

    def pending(self) -> dict[int, float]:
        """Shards that are begun and not finished, and for how many seconds."""
        now = time.monotonic()
        return {shard: now - begun for shard, begun in sorted(self.begun.items())}


class CountActor:
    """Counts what tasks have listed."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count

    def total(self) -> int:
        return self.count
