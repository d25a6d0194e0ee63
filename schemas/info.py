"""`info`: describe what is in a dataset."""

from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from schemas.counts import format_count
from schemas.dataset import ShardDataset

SUMMARIZED = ("image_bytes", "height", "width", "reencoded", "label")


@dataclass
class Totals:
    """Sums and limits over all samples, accumulated one part of the table at a time.

    Attributes:
        image_bytes: total size of the image members.
        reencoded: number of images that are not the source's own bytes.
        heights, widths: smallest and largest, in pixels; empty without samples.
        labels: number of samples by label.
    """

    image_bytes: int = 0
    reencoded: int = 0
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)

    def add(self, batch: pa.Table) -> None:
        """Add the samples of a table that has the columns SUMMARIZED."""
        self.image_bytes += pc.sum(batch["image_bytes"]).as_py() or 0
        self.reencoded += pc.sum(batch["reencoded"]).as_py() or 0
        self.labels.update(count_values(batch["label"]))
        for limits, name in ((self.heights, "height"), (self.widths, "width")):
            batch_limits = pc.min_max(batch[name]).as_py().values()
            bounds = [*limits, *(value for value in batch_limits if value is not None)]
            limits[:] = [min(bounds), max(bounds)] if bounds else []


def describe(dataset: ShardDataset) -> str:
    """Return counts, classes, bytes, rejects by reason and samples per shard, as lines of text."""
    card, side, totals = dataset.card, dataset.card.saliency_side, Totals()
    for batch in dataset.samples.batches(SUMMARIZED):
        totals.add(batch)
    lines = [
        f"{dataset.url}: {card.name} {card.split}, format version {card.format_version}",
        f"  samples    {len(dataset.samples)} in {format_count(len(dataset.shards), 'shard')}, "
        f"{describe_shard_sizes(dataset)}",
        f"  bytes      {sum(row.bytes for row in dataset.shards):,} in tars, "
        f"{totals.image_bytes:,} of them images",
        f"  images     {describe_image_sizes(totals)}",
        f"  saliency   {side} x {side} by {describe_estimator(dataset)}",
        f"  labels     {format_count(len(card.classes), 'class', 'classes')}, "
        f"{format_count(totals.labels[-1], 'sample')} without a label",
        f"  rejects    {count_rejects(dataset)}",
        f"  plan       seed {card.seed}, digest {card.plan[:16] or 'none'}",
        f"  written by {', '.join(f'{name} {version}' for name, version in card.versions.items())}",
    ]
    if card.classes:
        width = max(map(len, card.classes))
        lines.append("  samples a class:")
        lines += [
            f"    {name:{width}} {totals.labels[label]}" for label, name in enumerate(card.classes)
        ]
    return "\n".join(lines)


def count_values(column: pa.ChunkedArray) -> dict:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def describe_shard_sizes(dataset: ShardDataset) -> str:
    sizes = [row.samples for row in dataset.shards]
    return f"{format_range(min(sizes), max(sizes))} a shard" if sizes else "none"


def format_range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def describe_image_sizes(totals: Totals) -> str:
    if not totals.heights:
        return "none"
    heights, widths = (format_range(*limits) for limits in (totals.heights, totals.widths))
    return f"{heights} high, {widths} wide, {totals.reencoded} re-encoded"


def describe_estimator(dataset: ShardDataset) -> str:
    parameters = dict(dataset.card.estimator)
    name = parameters.pop("name", "an unnamed estimator")
    digest = parameters.pop("weights_sha256", None)
    given = {key: value for key, value in parameters.items() if value not in (None, "")}
    if digest:
        given["sha256"] = digest[:12]
    values = ", ".join(f"{key} {value}" for key, value in given.items())
    return f"{name} ({values})" if values else name


def count_rejects(dataset: ShardDataset) -> str:
    reasons = count_values(dataset.rejects["reason"])
    if not reasons:
        return "none"
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())}: {listed} (see rejects.parquet)"
