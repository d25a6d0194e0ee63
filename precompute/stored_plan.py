"""Store a plan in parquet files, for more images than fit in memory.

The images are split into buckets by the first bits of the hash that orders them, so the sorted
buckets one after the other form the global order. A shard is a range of that order, and a worker
reads its rows from one or two buckets.
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

from precompute.plan import Plan, compute_sort_key, cut_shards
from precompute.sources import SourceImage
from schemas.names import to_bytes
from schemas.storage import Store
from schemas.tables import open_parquet, read_columns

PLAN_FOLDER = ".saliency-plan"
"""Folder of plans below OUT. Each run has a separate subfolder and removes only that one, so that
runs cannot interfere."""
ROW_GROUP = 5_000
"""Rows of a row group, the least that a worker reads: a few shards' worth (our choice)."""
PLAN_SCHEMA = pa.schema(
    [
        # file names need not be valid UTF-8, so text is stored as bytes
        ("key", pa.binary()),
        ("location", pa.binary()),
        ("label", pa.int32()),
        ("annotation", pa.binary()),
    ]
)


def choose_bucket(order: bytes, buckets: int) -> int:
    """Return the bucket of an image, given its `compute_sort_key`; buckets ascend in that order."""
    return int.from_bytes(order[:4], "big") * buckets >> 32


def name_bucket(bucket: int) -> str:
    return f"{bucket:05d}.parquet"


def from_bytes(content: bytes) -> str:
    """Return the text encoded by `schemas.names.to_bytes`."""
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
    """Return the images of a table made by `to_table`."""
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
    """Sort the images of a bucket and write them; return their number."""
    order = sorted(images, key=lambda image: compute_sort_key(seed, image.key))
    buffer = io.BytesIO()
    pq.write_table(to_table(order), buffer, row_group_size=ROW_GROUP, compression="zstd")
    store.write(name_bucket(bucket), buffer.getvalue())
    return len(order)


def read_bucket(store: Store, bucket: int, start: int = 0, stop: int | None = None) -> pa.Table:
    """Return a table of the images of a bucket from index `start` up to `stop`, in order.

    Raises:
        FileNotFoundError, FormatError: the plan is missing or damaged.
    """
    name = name_bucket(bucket)
    location = store.location(name)
    file = open_parquet(store.read_ranges(name), location)
    tables, begin = [PLAN_SCHEMA.empty_table()], 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        end = begin + rows if stop is None else min(stop, begin + rows)
        if max(start, begin) < end:
            table = read_columns(file, PLAN_SCHEMA, location, group, required=())
            table = table.replace_schema_metadata(None)
            first = max(start, begin)
            tables.append(table.slice(first - begin, end - first))
        begin += rows
    return pa.concat_tables(tables)


class StoredShards(Sequence[list[SourceImage]]):
    """Sequence of the images of each shard, read from the plan's folder on access.

    Args:
        plan_folder: folder of the plan.
        counts: number of images in each bucket.
        shard_samples: maximum number of images per shard.
        limit: maximum number of images; the first ones of the global order are kept.
    """

    def __init__(
        self, plan_folder: str, counts: Sequence[int], shard_samples: int, limit: int | None
    ):
        self.plan_folder = plan_folder
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
            return [self[index] for index in range(*shard.indices(len(self)))]
        if not 0 <= shard < len(self):
            raise IndexError(shard)
        store = Store(self.plan_folder)
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
    """A plan whose images are stored in a folder, from which workers read their shards."""

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


def format_plan(images: Sequence[SourceImage], first: int, cuts: np.ndarray) -> bytes:
    """Return a range of the global order as `json.dumps` writes it within the whole plan.

    The digest of a plan covers the texts of all ranges, concatenated between "[[" and "]]", so it
    does not depend on how the plan was made.

    Args:
        images: the images of the range.
        first: index of the first of them in the global order.
        cuts: the bounds of the shards, from `cut_shards`.
    """
    begins = set(cuts[np.searchsorted(cuts, first) :].tolist())
    pieces = []
    for index, image in enumerate(images, first):
        if index:
            pieces.append("], [" if index in begins else ", ")
        pieces.append(json.dumps(image))
    return "".join(pieces).encode()


def compute_digest(texts: Iterator[bytes], shards: int) -> str:
    """Return the digest of a plan from the texts of all its ranges; see `format_plan`."""
    digest = hashlib.sha256(b"[[" if shards else b"[]")
    for text in texts:
        digest.update(text)
    if shards:
        digest.update(b"]]")
    return digest.hexdigest()
