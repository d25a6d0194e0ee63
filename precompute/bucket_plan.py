"""Plan a source of many images bucket by bucket, so that no process holds all of them.

Calls the steps of `plan_stages.py` in order through a `Runner`; `plan_job.py` has one that uses
Ray. The plan and the rejects equal those of `list_images` and `make_plan`, so a dataset may be
begun one way and completed the other.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from precompute import plan_stages as stages
from precompute.sources import Source, SourceImage
from precompute.sources.base import PartedSource, list_parts
from precompute.stored_plan import (
    StoredPlan,
    StoredShards,
    compute_digest,
    format_plan,
    read_bucket,
    to_images,
    to_table,
)
from schemas.storage import Store
from schemas.tables import Reject

R = TypeVar("R")

BUCKETS = 256
"""Number of buckets in a plan (our choice). A bucket has 40,000 of 10^7 images, or 4 million of
10^9 images, which take about 1 GB in a task."""
TEXTS_AT_ONCE = 8
"""Number of buckets whose texts are sent to the driver at a time; 0.5 GB each for 10^9 images."""
PARTS_AT_ONCE = 64
"""Number of a source's parts that one task lists, several of them in parallel."""


class PartGroup(NamedTuple):
    """Consecutive parts of a source, starting at index `first` of `parts_of(source)`."""

    first: int
    parts: list[str]


class Runner(Protocol):
    """Interface that runs the steps of a plan, in this process or on a cluster."""

    def shuffle(
        self, source: Source, groups: list[PartGroup], place: str, seed: int, buckets: int
    ) -> set[str]:
        """Call `list_rows` for each group, and `write_rows` for the rows of each bucket.

        Returns:
            the distinct labels that are text.
        """

    def map(
        self, function: Callable[..., R], arguments: Iterable[tuple], most: int | None = None
    ) -> Iterator[R]:
        """Yield `function(*argument)` for each argument, in order.

        Args:
            most: maximum number of calls that are in progress, or done and not yet yielded.
        """


@dataclass(frozen=True)
class StoredListing:
    """A plan and the other results of listing its source.

    Attributes:
        labels: number of images of each label.
        linked: local folders outside of ROOT that listing reached through links.
    """

    plan: StoredPlan
    rejects: list[Reject]
    labels: Counter[int]
    linked: list[str]


def plan_in_buckets(
    source: Source,
    place: str,
    runner: Runner,
    *,
    seed: int,
    shard_samples: int,
    limit: int | None = None,
    buckets: int = BUCKETS,
) -> StoredListing:
    """List a source and plan its shards; sets `source.classes` and `source.readers`.

    Args:
        place: an empty or new folder for the plan, which every node can read and write.
        The other arguments are those of `make_plan`.

    Raises:
        UserError: the source fails.
    """
    parts = list_parts(source)
    groups = [
        PartGroup(first, list(parts[first : first + PARTS_AT_ONCE]))
        for first in range(0, max(len(parts), 1), PARTS_AT_ONCE)
    ]
    texts = runner.shuffle(source, groups, place, seed, buckets)
    store = Store(place)
    facts = stages.read_facts(store, buckets)
    numbers: dict[str, int] = {}
    bad: dict[str, str] = {}
    if texts and isinstance(source, PartedSource):
        numbers, bad = source.number_labels(texts)
    else:
        source.classes = max((fact["classes"] for fact in facts), key=len, default=[])

    source.readers = max((fact["readers"] for fact in facts if fact["readers"]), default=None)
    every_bucket = ((bucket, seed, numbers, bad) for bucket in range(buckets))
    settled = list(runner.map(partial(stages.settle, place), every_bucket))
    counts = [result.images for result in settled]
    rejects = [
        *stages.read_rejects(store, buckets),
        *(r for result in settled for r in result.rejects),
    ]
    renamed = [image for result in settled for image in result.renamed]
    for bucket, count in move_renamed(renamed, place, runner, seed, buckets):
        counts[bucket] = count

    shards = StoredShards(place, counts, shard_samples, limit)
    every_bucket_text = ((bucket,) for bucket in range(buckets))
    texts_in_order = runner.map(partial(format_bucket, shards), every_bucket_text, TEXTS_AT_ONCE)
    plan = StoredPlan(shards, compute_digest(texts_in_order, len(shards)))
    labels: Counter[int] = sum((result.labels for result in settled), Counter())
    linked = sorted({folder for fact in facts for folder in fact["linked"]})
    return StoredListing(plan, [entry.reject for entry in sorted(rejects)], labels, linked)


def move_renamed(
    renamed: list[SourceImage], place: str, runner: Runner, seed: int, buckets: int
) -> Iterator[tuple[int, int]]:
    """Rename images whose keys were taken, and write them to the buckets of their new keys.

    Yields:
        each bucket that changed, and its new number of images.
    """
    if not renamed:
        return
    keys = [key for image in renamed for key in stages.list_candidates(image)]
    keys_by_bucket = stages.group_by_bucket(keys, str, seed, buckets)
    used_keys = runner.map(
        partial(stages.find_used_keys, place),
        ((bucket, set(bucket_keys)) for bucket, bucket_keys in keys_by_bucket.items()),
    )
    images = stages.rename(renamed, (key for bucket_keys in used_keys for key in bucket_keys))
    moved = stages.group_by_bucket(images, lambda image: image.key, seed, buckets)
    added = runner.map(
        partial(stages.add_images, place),
        ((bucket, seed, to_table(bucket_images)) for bucket, bucket_images in moved.items()),
    )
    yield from zip(moved, added, strict=True)


def format_bucket(shards: StoredShards, bucket: int) -> bytes:
    """Return a bucket's part of the text that the plan's digest covers; see `format_plan`."""
    first, end = shards.starts[bucket], min(shards.starts[bucket + 1], shards.images)
    if first >= end:
        return b""
    images = to_images(read_bucket(Store(shards.place), bucket, 0, end - first))
    return format_plan(images, first, shards.cuts)
