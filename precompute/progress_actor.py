"""What a job has done so far, counted in one actor.

Alone in its file: the actor's process need not import torch and DALI.
"""

import time


class ProgressActor:
    """Counts what the workers have done, and how often each shard was begun: one actor of a job."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.counts: dict[int, tuple[int, int]] = {}
        self.begun: dict[int, float] = {}
        self.first = self.last = time.monotonic()

    def begin(self, shard: int) -> int:
        """The number of this attempt, from 1; what an earlier one counted is forgotten."""
        if not self.attempts:
            self.first = time.monotonic()
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        self.counts[shard] = (0, 0)
        self.begun[shard] = time.monotonic()
        return self.attempts[shard]

    def advance(self, shard: int, written: int, rejected: int) -> None:
        before = self.counts[shard]
        self.counts[shard] = (before[0] + written, before[1] + rejected)

    def finish(self, shard: int) -> None:
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
