"""python -m precompute --dataset folder --root ROOT --out OUT

Read the images of a source, estimate their saliency and write both into WebDataset shards. After
an interruption, run the same command again: it builds only the missing shards, and the result is
identical to that of an uninterrupted run.
"""

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import tyro

from precompute.estimators import ESTIMATORS, EstimatorOptions, FunctionOptions, ScdaOptions
from precompute.guard import refuse_linked_inputs, refuse_own_inputs
from precompute.plan import Plan, make_plan
from precompute.sources import (
    Source,
    list_images,
    list_source,
    open_source,
)
from schemas.cli import parse, run
from schemas.counts import format_count
from schemas.errors import UserError
from schemas.info import count_rejects
from schemas.names import to_stored
from schemas.sample import UNLABELED
from schemas.storage import Store
from schemas.tables import REJECTS, SAMPLES, SHARDS, DatasetCard, Reject

if TYPE_CHECKING:
    from precompute.job import Job
    from precompute.summary import Summary

T = TypeVar("T")

MAX_IMAGES_IN_DRIVER = 2_000_000
"""Maximum number of images planned in this process: 1.1 GB at 540 bytes each (docs/scale.md)."""


@dataclass(frozen=True)
class Options:
    """Estimate the saliency of images and write both into shards; resumes an interrupted run.

    --dataset is one of: imagenet, imagenet100, imagenette, caltech101, flowers102, stl10, cifar10,
    voc, coco, coco-instances, folder (one folder per class), files (a glob or a list of files),
    webdataset (existing tars), demo (generated scenes), or FILE.py:Class for a custom source.
    """

    dataset: str = tyro.MISSING
    """Source of the images: one of the names listed above."""
    out: str = tyro.MISSING
    """Folder for the shards: a plain path or any fsspec URL (s3://bucket/folder)."""
    root: str = ""
    """Folder of the images, in torchvision's layout for the dataset; for `files` a glob or a text
    file; `demo` needs none. `folder`, `files`, `webdataset` and `imagenet` accept any fsspec
    URL."""
    split: str = "train"
    """Split of the dataset, by the dataset's own name for it (train, val, test; voc:
    07+12-trainval; caltech101: all)."""
    download: bool = False
    """Let torchvision download the dataset into ROOT first (not ImageNet, not COCO)."""
    image_member: str = ""
    """webdataset only: extension of the image, if a sample has several images (`input.jpg`)."""
    label_member: str = ""
    """webdataset only: extension of the label (`txt`), `json:FIELD` for a field of a JSON member,
    or `none`; by default `cls`, and without a `cls` member the field `label` of `json`."""
    label_text: bool = False
    """webdataset only: treat labels as class names even if they are digits."""
    keys_with_dots: bool = False
    """webdataset only: the extension begins at the last dot of a name (`img.0001.jpg`)."""
    name: str = ""
    """Name of the dataset in its card; by default the value of --dataset."""
    shard_samples: int = 1000
    """Maximum number of images per shard."""
    seed: int = 0
    """Random seed of the global shuffle, which decides the shard and position of every image."""
    plan: Literal["auto", "driver", "cluster"] = "auto"
    """Place where images are listed and planned: this process (`driver`), or Ray tasks (`cluster`),
    so that no node needs memory for all images. `auto` uses the cluster above 2 million images. The
    shards are the same either way."""
    limit: int | None = None
    """Maximum number of images: keep only the first ones of the shuffled order."""
    resize: int | None = None
    """Shrink images whose shorter side has more pixels than this to this size, and write them as
    JPEG; by default the bytes of every image stay unchanged."""
    resize_quality: int = 90
    """JPEG quality of images shrunk by --resize, 1 to 95."""
    extend: bool = False
    """Add the source's new images to a complete dataset, in new shards."""
    dry_run: bool = False
    """Print the plan (images, shards, bytes and time, estimated from a few batches on this machine)
    without writing anything to OUT."""
    batch_size: int = 32
    """Number of images decoded and estimated together; the last bits of the saliency maps depend
    on it."""
    workers: int = 0
    """Number of shards built at the same time. 0: 1 to 3 per GPU (one for every 2 CPU cores per
    GPU), or one per CPU core without a GPU."""
    cpus_per_worker: float = 0
    """CPU cores per worker; 0 for an even share."""
    gpus_per_worker: float = 0
    """GPUs per worker; may be a fraction (0.5: two workers per GPU); 0 for an even share. Use 1 for
    a GPU in exclusive-process mode, which accepts only one worker."""
    address: str | None = None
    """Address of an existing Ray cluster (`auto` for the one on this machine); by default a local
    one is started for the job."""
    estimator: EstimatorOptions = field(default_factory=ScdaOptions)
    """Saliency estimator and its options."""

    def __post_init__(self) -> None:
        minimums = {
            **{"shard_samples": 1, "batch_size": 1, "limit": 1, "workers": 0},
            **{"cpus_per_worker": 0, "gpus_per_worker": 0},
        }
        for option, minimum in minimums.items():
            value = getattr(self, option)
            if value is not None and value < minimum:
                flag = f"--{option.replace('_', '-')}"
                raise UserError(f"{flag} is {value}; it must be at least {minimum}")
        if self.dry_run and self.address:
            raise UserError(
                "--dry-run estimates the time on this machine, not on the cluster at "
                f"{self.address}; leave --address out"
            )


def main() -> int:
    options = parse(
        Options, named={"estimator": ESTIMATORS}, by_path={"estimator": FunctionOptions}
    )
    with contextlib.ExitStack() as stack:  # the cluster that plans also builds the shards
        return run_command(options, stack)


def run_command(options: Options, stack: contextlib.ExitStack) -> int:
    """Run the job; a cluster is entered into the stack, to outlive planning. Raises UserError."""
    from precompute.job import Resources, run_job  # slow: imports torch, DALI and Ray

    job = resolve(options, stack)
    resources = Resources(
        options.address, options.workers, options.cpus_per_worker, options.gpus_per_worker
    )
    if options.dry_run:
        from precompute.dry_run import Machine, estimate_job

        print(estimate_job(job, resources, Machine.detect()))
        return 0
    if not job.plan.images:
        print(f"nothing to do: {options.out} contains every image of the source")
        return 0
    print(f"{job.plan.describe()} in {job.out}", flush=True)
    summary = run_job(job, resources)
    print(report(summary))
    if len(summary.dataset) == 0:
        raise UserError(
            f"{options.out}: none of the images could be read; see rejects.parquet there"
        )
    return 0


def resolve(options: Options, stack: contextlib.ExitStack) -> "Job":
    """List the source and plan the shards. Raises UserError."""
    from precompute.job import Job
    from precompute.reencode import Resize

    resize = Resize(options.resize, options.resize_quality)
    # Absolute paths, because workers of an existing cluster have another current folder.
    out, root = Store(options.out).location(""), options.root
    if root and "://" not in root:
        root = os.path.abspath(root)
    if root:
        refuse_own_inputs(options.out, root)
    tar_options = ("image_member", "label_member", "label_text", "keys_with_dots")
    chosen = {name: value for name in tar_options if (value := getattr(options, name))}
    source = open_source(options.dataset, root, options.split, options.download, **chosen)
    planned = plan_source(options, source, root, out, stack)
    return Job(
        name=options.name or options.dataset,
        split=options.split,
        source=source,
        plan=planned.plan,
        rejects=planned.rejects,
        estimator=options.estimator,
        seed=options.seed,
        out=out,
        batch_size=options.batch_size,
        resize=resize,
        before=planned.before,
    )


class Planned(NamedTuple):
    """A plan, the rejects found while listing, and the card of the dataset to extend, if any."""

    plan: Plan
    rejects: list[Reject]
    before: DatasetCard | None


def plan_source(
    options: Options, source: Source, root: str, out: str, stack: contextlib.ExitStack
) -> Planned:
    """List a source and plan its shards, in this process or on the cluster. Raises UserError."""
    if options.extend and options.plan == "cluster":
        raise UserError("--extend compares with the existing dataset: use --plan driver")
    if options.plan == "cluster":
        return plan_with_ray(options, source, root, out, stack)
    try:
        limit = MAX_IMAGES_IN_DRIVER if options.plan == "auto" and not options.extend else None
        return plan_in_driver(options, source, root, out, limit)
    except TooManyImagesError:
        print(f"more than {MAX_IMAGES_IN_DRIVER:,} images: listing them again with Ray", flush=True)
    return plan_with_ray(options, source, root, out, stack)


def plan_in_driver(
    options: Options, source: Source, root: str, out: str, limit: int | None
) -> Planned:
    """Plan in this process. Raises UserError, TooManyImagesError."""
    from precompute.extend import select_new
    from precompute.progress import show_listing

    images, rejects = list_images(limit_count(limit, show_listing(list_source(source))))
    refuse_linked_inputs(options.out, source.linked_folders())
    if not images:
        raise UserError(explain_no_images(root, rejects))
    print(count_classes(Counter(image.label for image in images), source), flush=True)
    before = None
    if options.extend:
        before, images, rejects = select_new(out, images, rejects, list(source.classes))
    plan = make_plan(
        images, seed=options.seed, shard_samples=options.shard_samples, limit=options.limit
    )
    return Planned(plan, rejects, before)


def plan_with_ray(
    options: Options, source: Source, root: str, out: str, stack: contextlib.ExitStack
) -> Planned:
    """Plan on the cluster.

    The cluster and the removal of the plan's folder are entered into the stack.

    Raises:
        UserError: the source or the cluster fails.
    """
    from precompute.plan_job import plan_on_cluster
    from precompute.ray_cluster import connect_to_ray

    stack.enter_context(connect_to_ray(options.address))
    listing = plan_on_cluster(
        source,
        stack.enter_context(make_plan_folder(options, out)),
        seed=options.seed,
        shard_samples=options.shard_samples,
        limit=options.limit,
    )
    source.classes, source.readers = listing.classes, listing.readers
    refuse_linked_inputs(options.out, listing.linked)
    if not listing.plan.images:
        raise UserError(explain_no_images(root, listing.rejects))
    print(count_classes(listing.labels, source), flush=True)
    return Planned(listing.plan, listing.rejects, None)


@contextlib.contextmanager
def make_plan_folder(options: Options, out: str) -> Iterator[str]:
    """Provide a folder for this run's plan: below OUT, or a temporary one for a dry run."""
    from precompute.stored_plan import PLAN_FOLDER

    if options.dry_run:  # its cluster is on this machine, so no other node reads the plan
        with TemporaryDirectory(prefix="saliency-plan-") as folder:
            yield folder
        return
    store, name = Store(out), f"{PLAN_FOLDER}/{uuid.uuid4().hex[:8]}"
    try:
        yield store.location(name)
    finally:
        store.remove_folder(name)
        store.remove_empty_folder(PLAN_FOLDER)


class TooManyImagesError(Exception):
    """Raised when a source has more images than this process may plan."""


def limit_count(limit: int | None, entries: Iterable[T]) -> Iterator[T]:
    """Yield the entries. Raises TooManyImagesError when there are more than `limit`."""
    for count, entry in enumerate(entries, 1):
        if limit is not None and count > limit:
            raise TooManyImagesError
        yield entry


def count_classes(labels: Counter[int], source: Source) -> str:
    """Describe the listing, so that a wrong ROOT is noticed before the work begins.

    Args:
        labels: number of images of each label.

    Raises:
        UserError: a custom source gave a label that is no number of a class.
    """
    for label in labels:
        if not isinstance(label, int) or not UNLABELED <= label < len(source.classes):
            count = format_count(len(source.classes), "class", "classes")
            raise UserError(
                f"the source gives images the label {label!r}, but has {count}: labels are "
                "Python's int, -1 for none, otherwise below the number of classes"
            )
    images, classes = format_count(labels.total(), "image"), source.classes
    if not classes:
        return f"{images} without classes{source.hint()}"
    count = format_count(len(classes), "class", "classes")
    if labels.keys() <= {UNLABELED}:
        return f"{images} without a label; the annotations name {count}"
    empty = [to_stored(name) for label, name in enumerate(classes) if label not in labels]
    names = f" ({', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''})" if empty else ""
    return f"{images} in {count}, {len(empty)} without images{names}"


def explain_no_images(root: str, rejects: list[Reject]) -> str:
    """Explain why a source has no usable image: each reason, its count and its first input."""
    if not rejects:
        return f"{root}: no images in it; see `saliency-precompute --help` for ROOT"
    first = {reject.reason: reject for reject in reversed(rejects)}
    counts = Counter(reject.reason for reject in rejects)
    reasons = "; ".join(
        f"{count} {reason}, first {to_stored(first[reason].source)}: {first[reason].detail}"
        for reason, count in counts.most_common()
    )
    return f"{root}: all {len(rejects)} inputs are rejected: {reasons}"


def report(summary: "Summary") -> str:
    """Return a summary of a run as text for the terminal."""
    dataset = summary.dataset
    if not summary.shards:
        done = "only tables were missing and are written now"
        state = done if summary.has_written else "nothing to do"
        return f"{state}: {dataset.url} is complete, {format_count(len(dataset), 'sample')}"
    stats = summary.stats()
    share = stats["dataset"]["foreground"]
    return "\n".join(
        [
            f"{format_count(summary.images, 'image')} in {summary.seconds:.1f} s, "
            f"{stats['run']['images_per_second_at_work']:.1f} images/s excluding startup",
            f"rejects: {count_rejects(dataset)}",
            f"foreground: {share:.0%} of the cells" if share is not None else "foreground: none",
            f"{dataset.url}: {format_count(len(dataset), 'sample')} in "
            f"{format_count(len(dataset.shards), 'shard')}",
            f"tables: {SAMPLES}, {SHARDS}, {REJECTS}, stats.json there",
        ]
    )


def start() -> None:
    run(main, outlives_reader=True, decodes=True, resumes=True)


if __name__ == "__main__":
    start()
