"""From written shards to a dataset: the tables are merged, the card comes last."""

import itertools
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.sample import Sample
from schemas.shard import ShardMarker, read_marker, write_shard
from schemas.storage import Store
from schemas.tables import (
    CARD,
    REJECTS,
    REJECTS_SCHEMA,
    SAMPLES,
    SHARD_FOLDER,
    SHARDS,
    SHARDS_SCHEMA,
    DatasetCard,
    Reject,
    stored_reject,
    table_of,
    to_parquet,
)

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
) -> ShardDataset:
    """Merge the markers of shards 0 .. `shards` - 1 into the tables, then write the card.

    Args:
        rejects: inputs that no shard knows of; each shard's own rejects come behind them.
        packages: whose versions the card names.
        The rest is as in `DatasetCard`.

    Raises:
        UserError: two shards have a sample with the same key.
    """
    markers = [read_marker(store, shard) for shard in range(shards)]
    samples = pa.concat_tables([marker.samples for marker in markers])
    check_unique(samples["key"].to_pylist(), markers)
    listed = [stored_reject(reject) for reject in rejects]
    all_rejects = [*listed, *itertools.chain.from_iterable(m.rejects for m in markers)]
    store.write(SAMPLES, to_parquet(samples))
    store.write(SHARDS, to_parquet(table_of([m.row for m in markers], SHARDS_SCHEMA)))
    store.write(REJECTS, to_parquet(table_of(all_rejects, REJECTS_SCHEMA)))
    card = DatasetCard(
        name=name,
        split=split,
        samples=len(samples),
        shards=shards,
        rejects=len(all_rejects),
        classes=[to_stored(name) for name in classes],
        saliency_side=saliency_side,
        estimator=estimator,
        plan=plan,
        seed=seed,
        versions={package: metadata.version(package) for package in packages},
    )
    store.remove_temporaries(SHARD_FOLDER)
    store.write(CARD, card.to_json())
    return ShardDataset.open(store.url)


def check_unique(keys: list[str], markers: list[ShardMarker]) -> None:
    if len(set(keys)) == len(keys):
        return
    seen: set[str] = set()
    for marker in markers:
        for key in marker.samples["key"].to_pylist():
            if key in seen:
                raise UserError(f"key {key} comes twice, again in shard {marker.row.shard}")
            seen.add(key)


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
    """Write samples that are at hand, in the order given, as a whole dataset.

    For maps that come from elsewhere. The order is kept, so shuffle before: a loader's own shuffle
    reaches only a buffer's length. To make the maps, and to use many cores, there is `precompute`.

    Args:
        url: an empty or new folder.
        samples: all of one map side.
        shard_samples: samples a shard, at most.
        estimator: how the maps were made, for the card.

    Raises:
        UserError: the folder has a dataset already, there is no sample, or a key comes twice.
    """
    store = Store(url)
    if store.exists(CARD) or store.sizes(SHARD_FOLDER):
        raise UserError(f"{store.url}: has shards already; choose another folder")
    shards, sides = 0, set()
    for shard, group in enumerate(batched(samples, shard_samples)):
        write_shard(store, shard, group)
        sides |= {len(sample.saliency) for sample in group}
        shards = shard + 1
    if len(sides) != 1:
        raise UserError(f"{store.url}: maps must be of one side, not of {sorted(sides) or 'none'}")
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


def batched(items: Iterable[Sample], size: int) -> Iterable[list[Sample]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
