"""Summary of a run of the precompute job, and `stats.json`, which keeps it."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from schemas.dataset import ShardDataset
from schemas.storage import Store

STATS = "stats.json"


@dataclass(frozen=True)
class Summary:
    """Result of a run of the job.

    Attributes:
        dataset: the complete dataset.
        shards, images: number of shards and images that were missing before this run.
        seconds: duration of the run.
        at_work: seconds from the start of the first shard to the end of the last one, which
            excludes the start of Ray and of its workers.
        has_written: whether this run wrote anything; False if the dataset was complete before.
    """

    dataset: ShardDataset
    shards: int
    images: int
    seconds: float
    at_work: float
    has_written: bool = True

    def stats(self) -> dict[str, Any]:
        """Return the content of `stats.json`: statistics of the run and of the dataset."""
        dataset = self.dataset
        share = compute_mean_foreground(dataset)
        return {
            "run": {
                "images": self.images,
                "shards": self.shards,
                "seconds": round(self.seconds, 1),
                "seconds_at_work": round(self.at_work, 1),
                "images_per_second_at_work": round(self.images / max(self.at_work, 1e-9), 2),
            },
            "dataset": {
                "samples": len(dataset),
                "shards": len(dataset.shards),
                "bytes": sum(row.bytes for row in dataset.shards),
                "rejects": dict(Counter(dataset.rejects["reason"].to_pylist()).most_common()),
                "foreground": None if share is None else round(share, 4),
            },
        }


def compute_mean_foreground(dataset: ShardDataset) -> float | None:
    """Return the mean share of foreground cells over all samples; None if no sample has one."""
    total, count = 0.0, 0
    for batch in dataset.samples.batches(["foreground"]):
        shares = batch.column(0)
        total += pc.sum(shares).as_py() or 0.0
        count += len(shares) - shares.null_count
    return total / count if count else None


def write_stats(store: Store, summary: Summary) -> None:
    """Write `stats.json`. Raises UserError."""
    store.write(STATS, (json.dumps(summary.stats(), indent=2) + "\n").encode())
