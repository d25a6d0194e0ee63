"""Measure the rate of the precompute job and of its two ceilings, and how fast it resumes.

The job runs as for a user, including Ray, workers and files. Its rate excludes startup: it covers
the time from the start of the first shard to the end of the last one.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from bench.photos import list_photos
from bench.precompute_cpu import measure_cpu
from bench.table import Row, check_counts
from precompute.estimators import EstimatorOptions, ScdaOptions, SpectralOptions
from precompute.estimators.scda import WINDOWS_AT_ONCE, Place, ScdaEstimator, list_places
from precompute.estimators.windows import cut
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.ray_cluster import connect_to_ray
from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage, list_images
from precompute.threads import use_threads
from schemas import Sample
from schemas.shard import write_shard
from schemas.storage import Store


@dataclass(frozen=True)
class Options:
    """Measure images/s of the precompute job with one and two workers, and of its ceilings."""

    root: str = tyro.MISSING
    """Folder of photos."""
    out: Path = Path("out/bench-precompute.json")
    """JSON file for the figures."""
    rows: tuple[Literal["cpu", "scda", "fp32", "spectral"], ...] = (
        *("cpu", "scda", "fp32", "spectral"),
    )
    """Rows to measure: `cpu`, the CPU time of everything but network and pixels; the rates of
    `scda`, of the same in fp32, and of `spectral`, which needs thousands of images.
    """
    backbone: str = "resnet50"
    """Name of a torchvision classification CNN."""
    images: int = 128
    """Images per repeat."""
    shard_samples: int = 32
    """Images per shard."""
    repeats: int = 3
    """Number of repeats of each row."""
    finished_shards: int = 10_000
    """Number of shards of a finished job that is run again to time how fast it finds nothing to do;
    0 skips this.
    """

    def __post_init__(self) -> None:
        check_counts(self, "images", "shard_samples", "repeats")


class EstimatorBench:
    """The measurements of one estimator; each does its work once and returns images per second."""

    def __init__(self, options: Options, estimator: EstimatorOptions, folder: Path):
        self.options, self.estimator, self.folder = options, estimator, folder
        self.source, listed = list_photos(options.root)
        self.images = (listed * (options.images // len(listed) + 1))[: options.images]

    def measure_job(self, workers: int) -> float:
        """Run the whole job on all cores, with this number of workers."""
        unique = list(dict.fromkeys(self.images))
        plan = make_plan(unique, seed=0, shard_samples=self.options.shard_samples)
        out = self.folder / f"{time.monotonic_ns()}"
        job = Job("bench", "train", self.source, plan, [], self.estimator, 0, str(out), 32)
        summary = run_job(job, Resources(workers=workers))
        return summary.images / summary.at_work

    def measure_reading(self) -> float:
        """Only read, decode and cut the windows, on all cores of one process."""
        options = self.estimator
        builder = ShardBuilder(self.source, UnusedEstimator(), Store(self.folder), 32, Resize(), {})
        start = time.perf_counter()
        for group in builder.decode_batches(builder.read(self.images, {})):
            if isinstance(options, ScdaOptions) and group.images:
                for part in split_windows(group.pixels, options):
                    cut(group.pixels, part, options.size)
        return len(self.images) / (time.perf_counter() - start)

    def measure_backbone(self) -> float:
        """Run the backbone alone, on prepared windows, on all cores of one process."""
        estimator = self.estimator.build()
        if not isinstance(estimator, ScdaEstimator):
            raise TypeError(f"{self.estimator.name} has no backbone")
        builder = ShardBuilder(self.source, UnusedEstimator(), Store(self.folder), 32, Resize(), {})
        images = self.images[:32]
        ready = [
            cut(group.pixels, part, estimator.options.size)
            for group in builder.decode_batches(builder.read(images, {}))
            if group.images
            for part in split_windows(group.pixels, estimator.options)
        ]
        with torch.inference_mode():
            estimator.aggregate(ready[0])
            start = time.perf_counter()
            for pixels in ready:
                estimator.aggregate(pixels)
        return len(images) / (time.perf_counter() - start)


class UnusedEstimator:
    """Stand-in for an estimator that is never run."""

    side, weights_sha256, device, network_on_gpu = 1, None, "cpu", False

    def __call__(self, images: Any) -> np.ndarray:
        return np.zeros((len(images), 1, 1), np.float32)


def split_windows(images: Any, options: ScdaOptions) -> Iterator[list[Place]]:
    """Yield the windows of a batch in chunks, as the estimator takes them."""
    shapes = [tuple(image.shape[:2]) for image in images]
    chunk = WINDOWS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
    for area in options.areas:
        places = list_places(shapes, area)
        yield from (places[start : start + chunk] for start in range(0, len(places), chunk))


def measure(options: Options, folder: Path) -> list[Row]:
    """Measure all rows in turn, `repeats` times."""
    cores = len(os.sched_getaffinity(0))
    use_threads(cores)
    scda, fp32 = (
        EstimatorBench(
            options, ScdaOptions(options.backbone, "random", precision=precision), folder
        )
        for precision in ("bf16", "fp32")
    )
    spectral = EstimatorBench(options, SpectralOptions(), folder)
    rates = {
        "scda: read, decode, cut": scda.measure_reading,
        "scda: backbone alone": scda.measure_backbone,
        "scda: job, 1 worker": lambda: scda.measure_job(1),
        "scda: job, 2 workers": lambda: scda.measure_job(2),
        "fp32: backbone alone": fp32.measure_backbone,
        "fp32: job, 1 worker": lambda: fp32.measure_job(1),
        "spectral: read, decode": spectral.measure_reading,
        "spectral: job, 1 worker": lambda: spectral.measure_job(1),
        "spectral: job, 2 workers": lambda: spectral.measure_job(2),
    }
    rates = {name: rate for name, rate in rates.items() if name.split(":")[0] in options.rows}
    values: dict[str, list[float]] = {name: [] for name in rates}
    if not rates:
        return []
    with connect_to_ray(None):
        for _ in range(options.repeats):
            for name, rate in rates.items():
                values[name].append(rate())
    return [Row(name, row_rates) for name, row_rates in values.items()]


def measure_cpu_time(options: Options, folder: Path) -> str:
    """Return lines with the CPU time of a worker's work on the host."""
    bench = EstimatorBench(options, ScdaOptions(), folder)
    images = list(dict.fromkeys(bench.images))
    lines = []
    for name, cuts in (("", True), (" and without cutting the windows", False)):
        milliseconds = measure_cpu(
            bench.source, images, folder / f"cpu-{cuts}", options.repeats, cuts
        )
        median = statistics.median(milliseconds)
        lines.append(
            f"CPU time of all but network and pixels{name}: {median:.2f} ms per image, median of "
            f"{min(milliseconds):.2f} .. {max(milliseconds):.2f} ({len(images)} images): a "
            f"worker's process makes at most {1000 / median:.0f} images/s"
        )
    return "\n".join(lines)


def choose_baselines(names: Sequence[str]) -> dict[str, str]:
    """Return the row to compare each row with: a job's lower ceiling, or one worker for two."""
    baselines = {
        "scda: job, 1 worker": "scda: backbone alone",
        "scda: job, 2 workers": "scda: job, 1 worker",
        "fp32: job, 1 worker": "fp32: backbone alone",
        "fp32: backbone alone": "scda: backbone alone",
        "spectral: job, 1 worker": "spectral: read, decode",
        "spectral: job, 2 workers": "spectral: job, 1 worker",
    }
    return {name: row for name, row in baselines.items() if name in names and row in names}


def measure_memory(options: Options, folder: Path) -> tuple[float, float]:
    """Return the resident memory of a worker's process in MB, after 4 shards and after 24."""
    bench = EstimatorBench(options, SpectralOptions(), folder)
    builder = ShardBuilder(
        bench.source, SpectralOptions().build(), Store(folder / "memory"), 32, Resize(), {}
    )
    megabytes = []
    for shard in range(24):
        builder.build(shard, list(dict.fromkeys(bench.images)))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return megabytes[3], megabytes[-1]


class Listed(Source):
    """A source whose images are listed and never read."""

    def __init__(self, count: int):
        self.count = count

    def images(self) -> Iterator[SourceImage]:
        return (SourceImage(f"{n:06d}", f"{n:06d}", -1) for n in range(self.count))

    def read(self, image: SourceImage) -> bytes:
        raise NotImplementedError


def measure_finished(options: Options, folder: Path) -> float:
    """Return the seconds that a finished job of this many shards takes to find nothing to do."""
    source, out = Listed(options.finished_shards), folder / "finished"
    images, _ = list_images(source.images())
    plan = make_plan(images, seed=0, shard_samples=1)
    job = Job("bench", "train", source, plan, [], SpectralOptions(), 0, str(out), 32)
    settings, map_ = job.settings(None), np.zeros((28, 28), np.float32)
    for shard, (image,) in enumerate(plan.shards):
        sample = Sample(image.key, b"no image", "jpg", map_, -1, 1, 1, image.location)
        write_shard(Store(out), shard, [sample], settings=settings)
    run_job(job, Resources())  # writes the tables
    start = time.perf_counter()
    images, _ = list_images(source.images())
    make_plan(images, seed=0, shard_samples=1)
    summary = run_job(job, Resources())
    assert summary.shards == 0
    return time.perf_counter() - start
