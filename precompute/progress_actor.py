"""Ray actors that count the progress of a job.

They have a file without other imports, so that an actor's process need not import torch and DALI.
"""

import time


class ProgressActor:
    """Counts a job's finished images and the attempts at each shard; each job has one."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.counts: dict[int, tuple[int, int]] = {}
        self.begun: dict[int, float] = {}
        self.reads: dict[int, dict[str, float]] = {}
        self.first = self.last = time.monotonic()

    def begin(self, shard: int) -> int:
        """Return the number of this attempt, from 1; resets the counts of an earlier attempt."""
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
        """Record a shard's slow reads: the seconds that each has taken so far, by input."""
        self.reads[shard] = slow

    def slow_reads(self) -> dict[str, float]:
        return {name: seconds for slow in self.reads.values() for name, seconds in slow.items()}

    def finish(self, shard: int) -> None:
        self.reads.pop(shard, None)
        self.begun.pop(shard, None)  # absent if another attempt finished it, after a lost network
        self.last = time.monotonic()

    def at_work(self) -> float:
        """Return the seconds from the start of the first shard to the end of the last one."""
        return self.last - self.first

    def totals(self) -> tuple[int, int, int]:
        """Return the numbers of images written, images rejected and shards finished so far."""
        written, rejected = zip(*self.counts.values(), strict=True) if self.counts else ((), ())
        return sum(written), sum(rejected), len(self.counts) - len(self.begun)

    def pending(self) -> dict[int, float]:
        """Return the seconds since each unfinished shard was started."""
        now = time.monotonic()
        return {shard: now - begun for shard, begun in sorted(self.begun.items())}


class CountActor:
    """Counts the inputs that tasks have listed."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, count: int) -> None:
        self.count += count

    def total(self) -> int:
        return self.count
