"""`info`: what is in a dataset, for a person."""

import pyarrow.compute as pc

from schemas.dataset import ShardDataset


def describe(dataset: ShardDataset) -> str:
    """Counts, classes, bytes, rejects by reason and samples a shard, as lines of text."""
    card, samples = dataset.card, dataset.samples
    lines = [
        f"{dataset.url}: {card.name} {card.split}, format version {card.format_version}",
        f"  samples    {len(samples)} in {len(dataset.shards)} shards, {shard_sizes(dataset)}",
        f"  bytes      {sum(row.bytes for row in dataset.shards):,} in tars, "
        f"{pc.sum(samples['image_bytes']).as_py() or 0:,} of them images",
        f"  images     {image_sizes(dataset)}",
        f"  saliency   {card.saliency_side} x {card.saliency_side} by {estimator(dataset)}",
        f"  labels     {labels(dataset)}",
        f"  rejects    {reject_counts(dataset)}",
        f"  plan       seed {card.seed}, digest {card.plan[:16] or 'none'}",
        f"  written by {', '.join(f'{name} {version}' for name, version in card.versions.items())}",
    ]
    if card.classes:
        numbers = value_counts(samples["label"])
        width = max(map(len, card.classes))
        lines.append("  samples a class:")
        lines += [f"    {name:{width}} {numbers.get(i, 0)}" for i, name in enumerate(card.classes)]
    return "\n".join(lines)


def value_counts(column) -> dict:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}


def shard_sizes(dataset: ShardDataset) -> str:
    sizes = [row.samples for row in dataset.shards]
    return f"{min(sizes)} to {max(sizes)} a shard" if sizes else "none"


def image_sizes(dataset: ShardDataset) -> str:
    samples = dataset.samples
    if not len(samples):
        return "none"
    height, width = pc.min_max(samples["height"]).as_py(), pc.min_max(samples["width"]).as_py()
    reencoded = pc.sum(samples["reencoded"]).as_py()
    return (
        f"{height['min']} to {height['max']} high, {width['min']} to {width['max']} wide, "
        f"{reencoded} re-encoded"
    )


def estimator(dataset: ShardDataset) -> str:
    parameters = dict(dataset.card.estimator)
    name = parameters.pop("name", "an unnamed estimator")
    values = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{name} ({values})" if values else name


def labels(dataset: ShardDataset) -> str:
    unlabelled = value_counts(dataset.samples["label"]).get(-1, 0)
    return f"{len(dataset.classes)} classes, {unlabelled} samples without a label"


def reject_counts(dataset: ShardDataset) -> str:
    reasons = value_counts(dataset.rejects["reason"])
    if not reasons:
        return "none"
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())}: {listed} (see rejects.parquet)"
