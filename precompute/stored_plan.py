"""A plan that lies in parquet files of a folder, for more images than fit in memory.

The images are split into buckets by the first bits of the hash that orders them, so the buckets one
after the other, each sorted, are the global order. A shard is a range of that order: a worker reads
its rows from one bucket, or from two.
"""

import bisect
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from precompute.plan import Plan, cut_shards, plan_order
from precompute.sources import SourceImage
from schemas.names import to_bytes
from schemas.storage import Store
from schemas.tables import open_parquet, read_columns

PLAN_FOLDER = "plan"
"""Below OUT. Each run plans in a folder of its own there, so that it changes no other's plan."""
ROW_GROUP = 5_000
"""Rows that a worker reads at least: a few shards' worth (ours)."""
PLAN_SCHEMA = pa.schema(
    [
        # names of files may be no UTF-8, so text is kept as bytes
        ("key", pa.binary()),
        ("location", pa.binary()),
        ("label", pa.int32()),
        ("annotation", pa.binary()),
    ]
)


def bucket_of(order: bytes, buckets: int) -> int:
    """Return the bucket of an image by `plan_order`; buckets follow each other in that order."""
    return int.from_bytes(order[:4], "big") * buckets >> 32


def bucket_name(bucket: int) -> str:
    return f"{bucket:05d}.parquet"


def from_bytes(content: bytes) -> str:
    """Return the text that `schemas.names.to_bytes` was given."""
    return content.decode("utf-8", "surrogateescape")


def to_table(images: Sequence[SourceImage]) -> pa.Table:
    """Return images as a table of PLAN_SCHEMA."""
    columns = [
        [to_bytes(image.key) for image in images],
        [to_bytes(image.location) for image in images],
        [image.label for image in images],
        [to_bytes(image.annotation) for image in images],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, PLAN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=PLAN_SCHEMA)


def to_images(table: pa.Table) -> list[SourceImage]:
    """Return the images that `to_table` was given."""
    keys, locations, labels, annotations = (
        table.column(name).to_pylist() for name in PLAN_SCHEMA.names
    )
    return [
        SourceImage(from_bytes(key), from_bytes(location), label, from_bytes(annotation))
        for key, location, label, annotation in zip(
            keys, locations, labels, annotations, strict=True
        )
    ]


def write_bucket(store: Store, bucket: int, seed: int, images: Iterable[SourceImage]) -> int:
    """Sort the images of a bucket and write them; return how many they are."""
    order = sorted(images, key=lambda image: plan_order(seed, image.key))
    buffer = io.BytesIO()
    pq.write_table(to_table(order), buffer, row_group_size=ROW_GROUP, compression="zstd")
    store.write(bucket_name(bucket), buffer.getvalue())
    return len(order)


def read_bucket(store: Store, bucket: int, start: int = 0, stop: int | None = None) -> pa.Table:
    """Return the images of a bucket from place `start` up to `stop`, in order.

    Raises:
        FileNotFoundError, FormatError: the plan is missing or damaged.
    """
    name = bucket_name(bucket)
    location = store.location(name)
    file = open_parquet(store.read_ranges(name), location)
    tables, begin = [PLAN_SCHEMA.empty_table()], 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        end = begin + rows if stop is None else min(stop, begin + rows)
        if max(start, begin) < end:
            table = read_columns(file, PLAN_SCHEMA, location, group)
            table = table.replace_schema_metadata(None)
            first = max(start, begin)
            tables.append(table.slice(first - begin, end - first))
        begin += rows
    return pa.concat_tables(tables)


class StoredShards(Sequence[list[SourceImage]]):
    """The images of each shard, read from the plan's folder when they are asked for.

    Args:
        place: folder of the plan.
        counts: images in each bucket.
        limit: take only so many images of the global order.
        shard_samples: maximum number of images per shard.
    """

    def __init__(self, place: str, counts: Sequence[int], shard_samples: int, limit: int | None):
        self.place = place
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
        self.images = self.starts[-1] if limit is None else min(limit, self.starts[-1])
        self.cuts = np.array(cut_shards(self.images, shard_samples), np.int64)

    def __len__(self) -> int:
        return max(len(self.cuts) - 1, 0)

    def size(self, shard: int) -> int:
        """Return the number of images in a shard."""
        return int(self.cuts[shard + 1] - self.cuts[shard])

    @overload
    def __getitem__(self, shard: int) -> list[SourceImage]: ...

    @overload
    def __getitem__(self, shard: slice) -> list[list[SourceImage]]: ...

    def __getitem__(self, shard: int | slice) -> list[SourceImage] | list[list[SourceImage]]:
        if isinstance(shard, slice):
            return [self[place] for place in range(*shard.indices(len(self)))]
        if not 0 <= shard < len(self):
            raise IndexError(shard)
        store = Store(self.place)
        start, stop = int(self.cuts[shard]), int(self.cuts[shard + 1])
        images: list[SourceImage] = []
        bucket = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[bucket], min(stop, self.starts[bucket + 1])
            if start < end:
                images += to_images(read_bucket(store, bucket, start - first, end - first))
                start = end
            bucket += 1
        return images


@dataclass(frozen=True)
class StoredPlan(Plan):
    """A plan whose images lie in a folder; workers read their part from there."""

    shards: StoredShards

    @property
    def images(self) -> int:
        return self.shards.images

    def size(self, shard: int) -> int:
        return self.shards.size(shard)

    def message(self, shard: int) -> str:
        return ""

    def images_of(self, shard: int, message: str) -> list[SourceImage]:
        return self.shards[shard]

    def for_workers(self) -> "StoredPlan":
        return self


def plan_text(images: Sequence[SourceImage], first: int, cuts: np.ndarray) -> bytes:
    """Return a range of the global order as `json.dumps` writes it within the whole plan.

    The texts of all ranges, one after the other between "[[" and "]]", are what the digest of a
    plan is made of, so a plan has one digest wherever it was made.

    Args:
        images: from place `first` of the global order.
        cuts: of `cut_shards`.
    """
    begins = set(cuts[np.searchsorted(cuts, first) :].tolist())
    pieces = []
    for place, image in enumerate(images, first):
        if place:
            pieces.append("], [" if place in begins else ", ")
        pieces.append(json.dumps(image))
    return "".join(pieces).encode()


def digest_of(texts: Iterator[bytes], shards: int) -> str:
    """Return the digest of a plan by its texts, see `plan_text`."""
    digest = hashlib.sha256(b"[[" if shards else b"[]")
    for text in texts:
        digest.update(text)
    if shards:
        digest.update(b"]]")
    return digest.hexdigest()
