"""Measure how well an epoch is shuffled, by two figures.

Samples are shuffled globally when they are written, so a batch of neighbors on disk is a random
sample already. The sample order adds different neighbors in each epoch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.order import SHUFFLE_SHARDS, SampleOrder
from schemas import ShardDataset, UserError
from schemas.counts import format_count


@dataclass(frozen=True)
class Quality:
    """Shuffle quality of an order of samples.

    Attributes:
        classes: mean number of different classes per batch; 0 without labels.
        entropy: entropy in bits of the distance on disk between consecutive samples, in bins of
            doubling width. 0 if all samples follow their neighbors on disk.
    """

    classes: float
    entropy: float


def measure_quality(order: np.ndarray, labels: np.ndarray, batch_size: int) -> Quality:
    """Measure the shuffle quality of an order of samples.

    Args:
        order: (N,) sample numbers.
        labels: labels of all samples of the dataset, -1 for none.
        batch_size: samples per batch.

    Raises:
        UserError: N is below the batch size or below 2.
    """
    required = max(2, batch_size)
    if len(order) < required:
        raise UserError(f"samples: {len(order)}; measuring the shuffle needs at least {required}")
    used = len(order) // batch_size * batch_size
    batches = labels[order][:used].reshape(-1, batch_size)
    class_counts = [len(set(batch) - {-1}) for batch in batches.tolist()]
    distances = np.abs(np.diff(order))
    share = np.bincount(np.log2(distances).astype(int)) / len(distances)
    share = share[share > 0]
    return Quality(float(np.mean(class_counts)), float(-(share * np.log2(share)).sum()) + 0.0)


def describe_shuffle(url: str | Path, batch_size: int, samples: int, seed: int = 0) -> str:
    """Compare the first epoch with a perfect shuffle and with the order on disk, as text.

    Args:
        samples: number of samples to analyze, from the start of the epoch.

    Raises:
        UserError: `samples` or the size of the dataset is below max(2, `batch_size`).
    """
    if samples < 1:
        raise UserError(f"--samples is {samples}; it must be at least 1")
    dataset = ShardDataset.open(url)
    labels = dataset.samples["label"].to_numpy()
    sizes = [row.samples for row in dataset.shards]
    sample_order = SampleOrder(sizes, batch_size, seed)
    if sample_order.steps == 0:
        raise UserError(f"{url}: {len(labels)} samples are too few for batch {batch_size}")
    steps = range(min(sample_order.steps, -(-samples // batch_size)))
    order = np.concatenate([sample_order.batch(0, step) for step in steps])[:samples]
    rows = {
        "an epoch": order,
        "a perfect shuffle": np.random.default_rng(seed).permutation(len(labels))[: len(order)],
        "the order on disk": np.arange(len(order)),
    }
    lines = [
        f"  shuffle, over {format_count(len(order), 'sample')}, batches of {batch_size}, "
        f"windows of {format_count(SHUFFLE_SHARDS, 'shard')}:"
    ]
    for name, rows_in_order in rows.items():
        quality = measure_quality(rows_in_order, labels, batch_size)
        classes = f"{quality.classes:.1f} classes a batch, " if (labels >= 0).any() else ""
        lines.append(f"    {name:17}  {classes}{quality.entropy:.2f} bits of distance")
    return "\n".join(lines)
