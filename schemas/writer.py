"""Turn written shards into a dataset: merge their tables, then write the card."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.sample import Sample
from schemas.shard import ShardMarker, read_markers, write_shard
from schemas.storage import Store
from schemas.table_writer import KeyHashes, TableWriter
from schemas.tables import (
    CARD,
    MERGED_SAMPLES,
    REJECTS,
    REJECTS_SCHEMA,
    SAMPLES,
    SAMPLES_SCHEMA,
    SHARD_FOLDER,
    SHARDS,
    SHARDS_SCHEMA,
    DatasetCard,
    Reject,
    ShardRow,
    build_stored_reject,
    build_table,
    to_parquet,
)
from schemas.versions import version_of

PACKAGES = ("saliency-shards", "numpy", "pillow", "pyarrow")


def finish_dataset(
    store: Store,
    shards: int,
    *,
    name: str,
    split: str,
    classes: Sequence[str],
    saliency_side: int,
    estimator: dict[str, Any],
    plan: str,
    seed: int,
    rejects: Sequence[Reject] = (),
    packages: Sequence[str] = PACKAGES,
    check_marker: Callable[[ShardMarker], None] | None = None,
    before_card: Callable[[ShardDataset], None] | None = None,
) -> ShardDataset:
    """Merge the markers of shards 0 .. `shards` - 1 into the tables, then write the card.

    Markers are read in parallel, and the tables are written as they arrive. One row group of each
    table and 8 bytes for every key are held in memory.

    Args:
        rejects: inputs that belong to no shard; the rejects of the shards come after them.
        packages: packages whose versions the card records.
        check_marker: called with each marker; raises an exception for one that does not belong.
        before_card: called with the dataset when all but its card is written; whatever it writes is
            there if the card is.

    The other arguments are fields of `DatasetCard`.

    Raises:
        UserError: two samples have the same key.
    """
    merged = merge_markers(store, shards, rejects, check_marker)
    store.write(SHARDS, to_parquet(build_table(merged.shards, SHARDS_SCHEMA)))
    card = DatasetCard(
        name=to_stored(name),
        split=to_stored(split),
        samples=sum(row.samples for row in merged.shards),
        shards=shards,
        rejects=merged.rejects,
        classes=[to_stored(name) for name in classes],
        saliency_side=saliency_side,
        estimator=estimator,
        plan=plan,
        seed=seed,
        versions={package: version_of(package) for package in packages},
    )
    for folder in (SHARD_FOLDER, ""):  # a job that was killed while it merged leaves tables
        store.remove_temporaries(folder)
    if before_card:
        before_card(ShardDataset(store, card, merged.shards))
    store.write(CARD, card.to_json())
    return ShardDataset.open(store.url)


class Merged(NamedTuple):
    """The rows of shards.parquet, and the number of rows of rejects.parquet."""

    shards: list[ShardRow]
    rejects: int


def merge_markers(
    store: Store,
    shards: int,
    rejects: Sequence[Reject],
    check_marker: Callable[[ShardMarker], None] | None = None,
) -> Merged:
    """Write samples.parquet and rejects.parquet from the markers of the shards.

    A dataset of more than MERGED_SAMPLES samples gets no samples.parquet.

    Raises:
        UserError: two samples have the same key.
    """
    rows: list[ShardRow] = []
    hashes = KeyHashes()
    with contextlib.ExitStack() as stack:
        rejected = stack.enter_context(TableWriter(store, REJECTS, REJECTS_SCHEMA))
        rejected.add(
            build_table([build_stored_reject(reject) for reject in rejects], REJECTS_SCHEMA)
        )
        samples: TableWriter | None = TableWriter(store, SAMPLES, SAMPLES_SCHEMA)
        stack.push(lambda *error: samples.__exit__(*error) if samples else None)
        for marker in read_markers(store, range(shards)):
            if check_marker:
                check_marker(marker)
            rows.append(marker.row)
            hashes.add(marker.samples["key"].to_pylist())
            rejected.add(build_table(marker.rejects, REJECTS_SCHEMA))
            if samples and samples.rows + len(marker.samples) > MERGED_SAMPLES:
                samples.discard()
                samples = None
                store.remove(SAMPLES)  # left from before the dataset was extended
            if samples:
                samples.add(marker.samples)
        if repeated := hashes.repeated():
            check_unique(store, shards, repeated)
    return Merged(rows, rejected.rows)


def check_unique(store: Store, shards: int, repeated: set[int]) -> None:
    """Compare as text the keys with these hashes. Raises UserError with the first repeated key."""
    earlier_keys: set[str] = set()
    for marker in read_markers(store, range(shards)):
        for key in marker.samples["key"].to_pylist():
            if hash(key) in repeated:
                if key in earlier_keys:
                    raise UserError(f"key {key} is repeated in shard {marker.row.shard}")
                earlier_keys.add(key)


def write_dataset(
    url: str | Path,
    samples: Iterable[Sample],
    *,
    name: str,
    classes: Sequence[str] = (),
    shard_samples: int = 1000,
    split: str = "train",
    estimator: dict[str, Any] | None = None,
) -> ShardDataset:
    """Write samples in the order given as a complete dataset.

    Meant for maps that come from elsewhere. The order is kept, so shuffle first: a loader's own
    shuffle reaches only as far as its buffer. Use `precompute` to compute maps, and to use many
    cores.

    Args:
        url: an empty or new folder.
        samples: samples whose maps all have the same side.
        classes: names by label; may be empty if no sample has a label.
        shard_samples: maximum number of samples per shard, at least 1.
        estimator: description of how the maps were made, for the card.

    Raises:
        UserError: the folder has a dataset already, there is no sample, a key is repeated, a label
            has no class, the maps are not of one side, or `shard_samples` is below 1.
    """
    if shard_samples < 1:
        raise UserError(f"shard_samples is {shard_samples}; it must be at least 1")
    store = Store(url)
    if store.exists(CARD) or store.sizes(SHARD_FOLDER):
        raise UserError(f"{store.url}: has shards already; choose another folder")
    shards, sides = 0, set()
    for shard, group in enumerate(split_into_batches(samples, shard_samples)):
        sides |= {len(sample.saliency) for sample in group}
        check_group(store, group, sides, len(classes))
        write_shard(store, shard, group)
        shards = shard + 1
    if not shards:
        raise UserError(f"{store.url}: there is no sample to write")
    return finish_dataset(
        store,
        shards,
        name=name,
        split=split,
        classes=classes,
        saliency_side=sides.pop(),
        estimator=estimator or {},
        plan="",
        seed=0,
    )


def check_group(store: Store, group: list[Sample], sides: set[int], classes: int) -> None:
    """Check the samples of a shard before it is written. Keys of two shards are compared later.

    Args:
        sides: sides of all maps up to and including this shard.
        classes: number of classes.

    Raises:
        UserError: a key is repeated, a label has no class, or the maps are not of one side.
    """
    if len(sides) != 1:
        raise UserError(f"{store.url}: maps must be of one side, not of {sorted(sides)}")
    keys: set[str] = set()
    for sample in group:
        if sample.key in keys:
            raise UserError(f"{store.url}: key {sample.key} comes twice; keys must be unique")
        keys.add(sample.key)
        if sample.label >= classes:
            raise UserError(
                f"{store.url}: sample {sample.key} has the label {sample.label}, but there are "
                f"{classes} classes; name all of them in `classes`, or use the label -1"
            )


def split_into_batches(items: Iterable[Sample], size: int) -> Iterable[list[Sample]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
