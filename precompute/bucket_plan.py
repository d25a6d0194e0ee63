"""Plan a source of many images bucket by bucket, so that no process holds all of them.

`plan_in_buckets` calls the steps of `plan_stages.py` in order through a `Runner`; `plan_job.py`
implements one with Ray. The plan and the rejects equal those of `list_images` and `make_plan`, so a
dataset started one way can be completed the other way.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """Consecutive parts of a source, starting at index `first` of `list_parts(source)`."""

    first: int
    parts: list[str]


class Runner(Protocol):
    """Interface that runs the steps of a plan, in this process or on a cluster."""

    def shuffle(
        self, source: Source, groups: list[PartGroup], plan_folder: str, seed: int, buckets: int
    ) -> set[str]:
        """Call `list_rows` for each group, and `write_rows` for the rows of each bucket.

        Returns:
            the distinct labels that are text.
        """

    def map(
        self,
        function: Callable[..., R],
        arguments: Iterable[tuple],
        max_in_flight: int | None = None,
    ) -> Iterator[R]:
        """Yield `function(*argument)` for each argument, in order.

        Args:
            max_in_flight: maximum number of calls that are in progress, or done and not yet
                yielded.
        """


@dataclass(frozen=True)
class StoredListing:
    """A plan and the other results of listing its source.

    Attributes:
        labels: number of images of each label.
        linked: local folders outside of ROOT that listing reached through links.
        classes, readers: values of these attributes of the source after listing; see `Source`.
    """

    plan: StoredPlan
    rejects: list[Reject]
    labels: Counter[int]
    linked: list[str]
    classes: Sequence[str]
    readers: int | None


def plan_in_buckets(
    source: Source,
    plan_folder: str,
    runner: Runner,
    *,
    seed: int,
    shard_samples: int,
    limit: int | None = None,
    buckets: int = BUCKETS,
) -> StoredListing:
    """List a source and plan its shards.

    Args:
        plan_folder: an empty or new folder, which every node can read and write.
        The other arguments are those of `make_plan`.

    Raises:
        UserError: the source fails.
    """
    parts = list_parts(source)
    groups = [
        PartGroup(first, list(parts[first : first + PARTS_AT_ONCE]))
        for first in range(0, max(len(parts), 1), PARTS_AT_ONCE)
    ]
    text_labels = runner.shuffle(source, groups, plan_folder, seed, buckets)
    store = Store(plan_folder)
    part_infos = stages.read_part_infos(store, buckets)
    numbers: dict[str, int] = {}
    invalid_labels: dict[str, str] = {}
    if text_labels and isinstance(source, PartedSource):
        numbers, invalid_labels = source.number_labels(text_labels)
        classes = source.classes
    else:
        classes = max((info["classes"] for info in part_infos), key=len, default=[])

    readers = max((info["readers"] for info in part_infos if info["readers"]), default=None)
    every_bucket = ((bucket, seed, numbers, invalid_labels) for bucket in range(buckets))
    bucket_results = list(runner.map(partial(stages.finish_bucket, plan_folder), every_bucket))
    counts = [result.images for result in bucket_results]
    rejects = [
        *stages.read_rejects(store, buckets),
        *(reject for result in bucket_results for reject in result.rejects),
    ]
    renamed = [image for result in bucket_results for image in result.renamed]
    for bucket, count in move_renamed(renamed, plan_folder, runner, seed, buckets):
        counts[bucket] = count

    shards = StoredShards(plan_folder, counts, shard_samples, limit)
    every_bucket_text = ((bucket,) for bucket in range(buckets))
    texts_in_order = runner.map(partial(format_bucket, shards), every_bucket_text, TEXTS_AT_ONCE)
    plan = StoredPlan(shards, compute_digest(texts_in_order, len(shards)))
    return StoredListing(
        plan=plan,
        rejects=[entry.reject for entry in sorted(rejects)],
        labels=sum((result.labels for result in bucket_results), Counter()),
        linked=sorted({folder for info in part_infos for folder in info["linked"]}),
        classes=classes,
        readers=readers,
    )


def move_renamed(
    renamed: list[SourceImage], plan_folder: str, runner: Runner, seed: int, buckets: int
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
        partial(stages.find_used_keys, plan_folder),
        ((bucket, set(bucket_keys)) for bucket, bucket_keys in keys_by_bucket.items()),
    )
    images = stages.rename(renamed, (key for bucket_keys in used_keys for key in bucket_keys))
    moved = stages.group_by_bucket(images, lambda image: image.key, seed, buckets)
    added = runner.map(
        partial(stages.add_images, plan_folder),
        ((bucket, seed, to_table(bucket_images)) for bucket, bucket_images in moved.items()),
    )
    yield from zip(moved, added, strict=True)


def format_bucket(shards: StoredShards, bucket: int) -> bytes:
    """Return a bucket's part of the text that the plan's digest covers; see `format_plan`."""
    first, end = shards.starts[bucket], min(shards.starts[bucket + 1], shards.images)
    if first >= end:
        return b""
    images = to_images(read_bucket(Store(shards.plan_folder), bucket, 0, end - first))
    return format_plan(images, first, shards.cuts)
