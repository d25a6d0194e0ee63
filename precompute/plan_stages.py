"""The steps of planning on a cluster, as functions that do not depend on Ray.

1. `list_rows`: list the inputs of some parts of a source as rows with a bucket number
2. `write_rows`: write the rows of one bucket, gathered by the shuffle, into a file
3. `finish_bucket`: number the labels of one bucket, find duplicate keys and sort the images
4. `rename`: give new keys to the images whose keys were taken, on the driver
5. `add_images`: move these images into the buckets of their new keys

`plan_folder` is a folder that every node can read and write.

Together the steps give the plan and the rejects of `list_images` and `make_plan`, in the same
order.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import pyarrow as pa

from precompute.plan import compute_sort_key
from precompute.sources import Source, SourceImage
from precompute.sources.base import (
    KEY_DIGITS,
    Entry,
    LabeledText,
    compute_walk_key,
    digest_key,
    list_in_parallel,
    make_unique_key,
    number_label,
)
from precompute.stored_plan import (
    PLAN_SCHEMA,
    choose_bucket,
    from_bytes,
    read_bucket,
    to_images,
    write_bucket,
)
from schemas.names import to_bytes
from schemas.storage import Store
from schemas.tables import Reject, from_parquet, to_parquet

ROWS_AT_ONCE = 20_000
LISTED = "listed"
ROWS_SCHEMA = pa.schema(
    [
        ("bucket", pa.int32()),
        ("order", pa.int64()),  # position in the listing: part << 32 | position within the part
        ("text", pa.binary()),  # the label of a LabeledText, else null
        *PLAN_SCHEMA,  # for a reject: reason, source, 0, detail; for part infos: "", "", 0, JSON
    ]
)


class Ordered(NamedTuple):
    """A reject and its sort order: rejects found while listing come before those among images."""

    phase: int
    order: int
    reject: Reject


class BucketResult(NamedTuple):
    """Result of step 3 for one bucket.

    Attributes:
        images: number of images written; they keep their keys.
        labels: number of images with each label, including the images to be renamed.
        rejects: images that were listed twice or have an invalid label.
        renamed: images to be renamed, because another image keeps their key.
    """

    images: int
    labels: Counter[int]
    rejects: list[Ordered]
    renamed: list[SourceImage]


def number_rejects_bucket(buckets: int) -> int:
    """Return the number that marks rows of rejects, in place of a bucket's number."""
    return buckets


def number_infos_bucket(buckets: int) -> int:
    """Return the number that marks the rows that `read_part_infos` reads."""
    return buckets + 1


def name_rows(bucket: int) -> str:
    return f"{LISTED}/{bucket:05d}.parquet"


def list_rows(
    source: Source, first: int, parts: Sequence[str], seed: int, buckets: int
) -> Iterator[pa.Table]:
    """List some parts of a source, several at a time, as tables of ROWS_SCHEMA.

    Args:
        first: index of the first of these parts in `list_parts(source)`.
    """
    rows: list[tuple] = []
    for order, entry in order_entries(source, first, parts):
        rows.append(make_row(entry, order, seed, buckets))
        if len(rows) == ROWS_AT_ONCE:
            yield build_table(rows)
            rows = []
    info = {
        "classes": list(source.classes),
        "linked": list(source.linked_folders()),
        "readers": source.readers,
    }
    text = json.dumps(info).encode()
    rows.append((number_infos_bucket(buckets), first << 32, None, b"", b"", 0, text))
    yield build_table(rows)


def order_entries(source: Source, first: int, parts: Sequence[str]) -> Iterator[tuple[int, Entry]]:
    for number, entries in enumerate(list_in_parallel(source, parts), first):
        yield from ((number << 32 | index, entry) for index, entry in enumerate(entries))


def make_row(entry: Entry, order: int, seed: int, buckets: int) -> tuple:
    if isinstance(entry, Reject):
        reason, source, detail = map(to_bytes, (entry.reason, entry.source, entry.detail))
        return number_rejects_bucket(buckets), order, None, reason, source, 0, detail
    labeled = entry if isinstance(entry, LabeledText) else None
    text = to_bytes(labeled.text) if labeled else None
    key, location, label, annotation = labeled.image if labeled else cast(SourceImage, entry)
    bucket = choose_bucket(compute_sort_key(seed, key), buckets)
    return bucket, order, text, to_bytes(key), to_bytes(location), label, to_bytes(annotation)


def build_table(rows: Sequence[tuple]) -> pa.Table:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, ROWS_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=ROWS_SCHEMA)


def write_rows(table: pa.Table, plan_folder: str) -> pa.Table:
    """Write all rows of one bucket.

    Returns:
        a table of one row: the bucket's number, its number of rows, and the distinct labels that
        are text, as JSON.
    """
    bucket = table.column("bucket")[0].as_py()
    table = table.select(ROWS_SCHEMA.names).cast(ROWS_SCHEMA).sort_by("order")
    Store(plan_folder).write(name_rows(bucket), to_parquet(table))
    texts = table.column("text").unique().drop_null().to_pylist()
    text_labels = json.dumps([from_bytes(text) for text in texts])
    return pa.table({"bucket": [bucket], "rows": [len(table)], "text_labels": [text_labels]})


def read_rows(store: Store, bucket: int) -> pa.Table:
    """Return the rows of a bucket in the order of listing; an empty table if there are none."""
    name = name_rows(bucket)
    try:
        with store.translate_read_errors(name):
            content = store.read(name)
    except FileNotFoundError:
        return ROWS_SCHEMA.empty_table()
    return from_parquet(content, ROWS_SCHEMA, store.location(name), required=())


def read_rejects(store: Store, buckets: int) -> list[Ordered]:
    """Return the rejects that the source found while it was listed."""
    table = read_rows(store, number_rejects_bucket(buckets))
    orders = table.column("order").to_pylist()
    return [
        Ordered(0, order, Reject(entry.location, entry.key, entry.annotation))
        for order, entry in zip(orders, to_images(table.select(PLAN_SCHEMA.names)), strict=True)
    ]


def read_part_infos(store: Store, buckets: int) -> list[dict[str, Any]]:
    """Return the source's classes, linked folders and readers, for each group of parts listed."""
    table = read_rows(store, number_infos_bucket(buckets))
    return [json.loads(info) for info in table.column("annotation").to_pylist()]


def finish_bucket(
    plan_folder: str,
    bucket: int,
    seed: int,
    numbers: Mapping[str, int],
    invalid_labels: Mapping[str, str],
) -> BucketResult:
    """Number the labels of a bucket, keep one image per key, and write the images in order.

    Args:
        numbers, invalid_labels: the results of `PartedSource.number_labels`.
    """
    store = Store(plan_folder)
    table = read_rows(store, bucket)
    images = to_images(table.select(PLAN_SCHEMA.names))
    texts = table.column("text").to_pylist()
    labels: Counter[int] = Counter()
    rejects: list[Ordered] = []
    groups: dict[str, dict[str, SourceImage]] = defaultdict(dict)
    for order, image, text in zip(table.column("order").to_pylist(), images, texts, strict=True):
        entry: SourceImage | Reject = image
        phase = 0
        if text is not None:
            labeled = LabeledText(image, from_bytes(text))
            entry, phase = number_label(labeled, numbers, invalid_labels), 1
        if not isinstance(entry, Reject) and entry.location in groups.get(entry.key, {}):
            entry = Reject(entry.location, "duplicate", "listed more than once")
        if isinstance(entry, Reject):
            rejects.append(Ordered(phase, order, entry))
        else:
            groups[entry.key][entry.location] = entry
            labels[entry.label] += 1
    kept: list[SourceImage] = []
    renamed: list[SourceImage] = []
    for group in groups.values():
        first, *clashing = sorted(
            group.values(), key=lambda image: compute_walk_key(image.location)
        )
        kept.append(first)
        renamed += clashing
    return BucketResult(write_bucket(store, bucket, seed, kept), labels, rejects, renamed)


def list_candidates(image: SourceImage) -> list[str]:
    """Return the keys that `make_unique_key` may give an image."""
    return [digest_key(image.key, image.location, digits) for digits in KEY_DIGITS]


def find_used_keys(plan_folder: str, bucket: int, keys: Container[str]) -> list[str]:
    """Return the keys that images of the bucket already have."""
    bucket_keys = read_bucket(Store(plan_folder), bucket).column("key").to_pylist()
    return [key for key in map(from_bytes, bucket_keys) if key in keys]


def rename(renamed: Iterable[SourceImage], used_keys: Iterable[str]) -> list[SourceImage]:
    """Give images unique keys, in the same way as `list_images`.

    Args:
        used_keys: keys from `list_candidates` that other images have.
    """
    keys = set(used_keys)
    images = []
    for image in sorted(renamed, key=lambda image: (image.key, compute_walk_key(image.location))):
        own = make_unique_key(image.key, image.location, keys)
        keys.add(own)
        images.append(image._replace(key=own))
    return images


def group_by_bucket(
    items: Iterable[Any], key: Callable[[Any], str], seed: int, buckets: int
) -> dict[int, list[Any]]:
    """Group items by the bucket of their keys."""
    groups: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        groups[choose_bucket(compute_sort_key(seed, key(item)), buckets)].append(item)
    return groups


def add_images(plan_folder: str, bucket: int, seed: int, table: pa.Table) -> int:
    """Add images to a bucket that has been written; return its new number of images.

    Args:
        table: the images, as a table from `to_table`.
    """
    store = Store(plan_folder)
    existing = to_images(read_bucket(store, bucket))
    return write_bucket(store, bucket, seed, [*existing, *to_images(table)])
