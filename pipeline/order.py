"""How well an epoch is shuffled: the order that the loader's own reader gives, in two figures.

Samples were shuffled globally when they were written, so a batch of neighbours on disk is a random
draw already; what the reader adds is another order each epoch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nvidia.dali import pipeline_def

from pipeline import devices, reader
from pipeline.graph import in_drawn_order, read_shuffled
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


def epoch_order(url: str | Path, samples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    """Places on disk of the first samples of an epoch, as one rank of one visits them.

    Returns:
        (at most `samples`,) int64, rows of the sample table.
    """
    shards = reader.open_shards(url)
    rows = {key: row for row, key in enumerate(ShardDataset.open(url).samples["key"].to_pylist())}
    size = min(1024, shards.samples)
    shared = (seed, 1, 0)

    @pipeline_def
    def graph() -> object:
        ordered = in_drawn_order(shards, *shared)
        return read_shuffled(ordered, 0, 1, reader.derived_seed("reader", *shared)).source

    pipeline = graph(batch_size=size, num_threads=reader.threads(), device_id=None)
    batches = -(-shards.samples // size)
    found: list[str] = []
    for step in range((epoch + 1) * batches):
        (source,) = reader.run(pipeline, devices.device_of("cpu"), shards)
        if step < epoch * batches:
            continue
        found += reader.parse_keys(reader.tensor(source))
        if len(found) >= samples:
            break
    found = found[: min(samples, shards.samples)]  # the last batch of an epoch is padded
    return np.array([rows[key] for key in found])


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


def describe(url: str | Path, batch_size: int, samples: int, seed: int = 0) -> str:
    """The first epoch's figures beside those of a perfect shuffle and of the order on disk."""
    table = ShardDataset.open(url).samples
    labels = table["label"].to_numpy()
    order = epoch_order(url, samples, seed)
    rows = {
        "as it is read": order,
        "a perfect shuffle": np.random.default_rng(seed).permutation(len(labels))[: len(order)],
        "the order on disk": np.arange(len(order)),
    }
    lines = [f"  shuffle, over {len(order)} samples, batches of {batch_size}:"]
    for name, rows_in_order in rows.items():
        found = quality(rows_in_order, labels, batch_size)
        classes = f"{found.classes:.1f} classes a batch, " if (labels >= 0).any() else ""
        lines.append(f"    {name:17}  {classes}{found.entropy:.2f} bits of distance")
    return "\n".join(lines)
