"""How well an epoch is shuffled, in two figures.

Samples were shuffled globally when they were written, so a batch of neighbors on disk is a random
draw already; what the order of an epoch adds is other neighbors in each epoch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.order import SHUFFLE_SHARDS, SampleOrder
from schemas import ShardDataset, UserError


@dataclass(frozen=True)
class Quality:
    """Of an order of samples, visited in batches.

    Attributes:
        classes: different classes in a batch, mean; 0 without labels.
        entropy: bits, of how far apart on disk two samples are that follow each other, in bins that
            double in width. 0 where each is followed by its neighbour.
    """

    classes: float
    entropy: float


def quality(order: np.ndarray, labels: np.ndarray, batch_size: int) -> Quality:
    """Figures of an order.

    Args:
        order: (N,) rows. labels: of all rows, -1 for none.

    Raises:
        UserError: N is below the batch size.
    """
    if len(order) < max(2, batch_size):
        raise UserError(f"{len(order)} samples are less than a batch of {batch_size}")
    whole = len(order) // batch_size * batch_size
    batches = labels[order][:whole].reshape(-1, batch_size)
    classes = [len(set(batch) - {-1}) for batch in batches.tolist()]
    steps = np.abs(np.diff(order))
    share = np.bincount(np.log2(steps).astype(int)) / len(steps)
    share = share[share > 0]
    return Quality(float(np.mean(classes)), float(-(share * np.log2(share)).sum()) + 0.0)


def describe(
    url: str | Path,
    batch_size: int,
    samples: int,
    seed: int = 0,
    shuffle_shards: int = SHUFFLE_SHARDS,
) -> str:
    """Return the first epoch's figures beside those of a perfect shuffle and of the order on disk.

    Args:
        samples: how many of the epoch's first samples are looked at.
    """
    dataset = ShardDataset.open(url)
    labels = dataset.samples["label"].to_numpy()
    sizes = [row.samples for row in dataset.shards]
    epoch = SampleOrder(sizes, batch_size, seed, shuffle_shards)
    steps = range(min(epoch.steps, -(-samples // batch_size)))
    order = np.concatenate([epoch.batch(0, step) for step in steps])[:samples]
    rows = {
        "an epoch": order,
        "a perfect shuffle": np.random.default_rng(seed).permutation(len(labels))[: len(order)],
        "the order on disk": np.arange(len(order)),
    }
    lines = [
        f"  shuffle, over {len(order)} samples, batches of {batch_size}, "
        f"windows of {shuffle_shards} shards:"
    ]
    for name, rows_in_order in rows.items():
        found = quality(rows_in_order, labels, batch_size)
        classes = f"{found.classes:.1f} classes a batch, " if (labels >= 0).any() else ""
        lines.append(f"    {name:17}  {classes}{found.entropy:.2f} bits of distance")
    return "\n".join(lines)
