"""python -m precompute --dataset folder --root ROOT --out OUT

Reads the images of a source, estimates their saliency and writes both into WebDataset shards. Run
it again after an interruption: it does only what is missing, and ends with the same bytes.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tyro

from precompute.estimators import ESTIMATORS, EstimatorOptions, ScdaOptions
from precompute.plan import make_plan
from precompute.sources import SOURCES, list_images
from schemas.cli import lookup, parse, run
from schemas.errors import UserError
from schemas.info import reject_counts
from schemas.storage import Store

if TYPE_CHECKING:
    from precompute.job import Summary


@dataclass(frozen=True)
class Options:
    """Estimate the saliency of images and write both into shards. Goes on where it was stopped."""

    dataset: str = tyro.MISSING
    """Where the images come from: `folder` (one folder a class) or `demo` (generated scenes)."""
    out: str = tyro.MISSING
    """Folder for the shards: a plain path or any fsspec URL."""
    root: str = ""
    """Folder of the images: a plain path or any fsspec URL; `demo` needs none."""
    split: str = "train"
    """Name of the split, for the card; `demo` makes other scenes for each."""
    name: str = ""
    """Name of the dataset, for the card; by default what --dataset says."""
    shard_samples: int = 1000
    """Images a shard, at most."""
    seed: int = 0
    """Of the global shuffle: which image goes into which shard, in which order."""
    limit: int | None = None
    """Take only so many images, the first of the shuffled order."""
    batch_size: int = 32
    """Images that are decoded and estimated together."""
    workers: int = 0
    """Shards that are built at a time; 0 for one a GPU, or one a CPU core without a GPU."""
    address: str | None = None
    """Of a running Ray cluster; by default a local one is started and ended."""
    estimator: EstimatorOptions = field(default_factory=ScdaOptions)
    """How saliency is estimated."""

    def __post_init__(self) -> None:
        least = {"shard_samples": 1, "batch_size": 1, "limit": 1, "workers": 0}
        for option, bound in least.items():
            value = getattr(self, option)
            if value is not None and value < bound:
                raise UserError(f"--{option.replace('_', '-')} is {value}; at least {bound}")


def main() -> int:
    options = parse(Options, named={"estimator": ESTIMATORS})
    from precompute.job import Job, run_job  # torch, DALI and Ray: not before the options are sound

    if options.root and f"{Store(options.out).root}/".startswith(f"{Store(options.root).root}/"):
        raise UserError(f"{options.out}: lies inside {options.root}, whose files are the inputs")
    source = lookup("dataset", options.dataset, SOURCES)(options.root, options.split)
    images, rejects = list_images(source)
    if not images:
        raise UserError(
            f"{options.root}: no images in it; ROOT is a folder with one folder a class"
        )
    plan = make_plan(
        images, seed=options.seed, shard_samples=options.shard_samples, limit=options.limit
    )
    print(f"{plan.images} images -> {len(plan.shards)} shards in {options.out}", flush=True)
    job = Job(
        name=options.name or options.dataset,
        split=options.split,
        source=source,
        plan=plan,
        rejects=rejects,
        estimator=options.estimator,
        seed=options.seed,
        out=options.out,
        batch_size=options.batch_size,
    )
    summary = run_job(job, options.workers, options.address)
    print(report(summary))
    if len(summary.dataset) == 0:
        raise UserError(
            f"{options.out}: none of the images could be read; see rejects.parquet there"
        )
    return 0


def report(summary: "Summary") -> str:
    dataset = summary.dataset
    if not summary.shards:
        return f"nothing to do: {dataset.url} is whole, {len(dataset)} samples"
    rate = summary.images / summary.seconds
    return "\n".join(
        [
            f"{summary.images} images in {summary.seconds:.1f} s, start to end {rate:.1f} images/s",
            f"rejects: {reject_counts(dataset)}",
            f"{dataset.url}: {len(dataset)} samples in {len(dataset.shards)} shards",
        ]
    )


if __name__ == "__main__":
    run(main)
