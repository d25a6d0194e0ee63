"""Estimate the plan, size and time of a job without writing anything (`--dry-run`)."""

import itertools
import os
import time
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from precompute.estimators import Estimator
from precompute.job import Job, Resources
from precompute.resume import find_missing_shards
from precompute.shard_builder import ShardBuilder
from precompute.sources import SourceImage
from precompute.threads import limit_torch_threads, use_threads
from schemas.saliency import SaliencyMap
from schemas.storage import Store

BATCHES = 3
"""Number of batches made to measure rate and size; the first one warms up and is not timed."""


@dataclass(frozen=True)
class Machine:
    """The CPU cores and GPUs that the job will have."""

    cores: int
    devices: int

    @classmethod
    def here(cls) -> "Machine":
        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count())


@dataclass(frozen=True)
class Sampled:
    """Measurements of a few batches.

    Attributes:
        size: bytes of the images that would be written, with their maps.
        written: number of these images.
        rejected: number of rejected images.
        seconds: time that the timed images took.
        timed: number of timed images.
    """

    size: int
    written: int
    rejected: int
    seconds: float
    timed: int


def estimate_job(job: Job, resources: Resources, machine: Machine) -> str:
    """Estimate images, shards, bytes and time of a job from a few batches made in this process.

    Nothing is written.

    Raises:
        UserError: in the same cases as the job itself.
    """
    estimator = job.estimator.build()
    missing = find_missing_shards(
        Store(job.out), job.settings(estimator.weights_sha256), job.default_settings
    )
    places = [shard - job.first_shard for shard in missing]
    images = sum(map(job.plan.size, places))
    lines = [
        f"{job.plan.images} images -> {len(job.plan.shards)} shards in {job.out}; "
        f"{len(job.rejects)} inputs are rejected already",
        f"missing: {len(missing)} shards, {images} images",
    ]
    if not images:
        return "\n".join(lines)
    workers, cpus, _ = resources.split(machine.cores, machine.devices, len(missing))
    threads = max(1, int(cpus))
    use_threads(threads)
    limit_torch_threads(estimator)
    planned = (image for place in places for image in job.plan.shards[place])
    sample = list(itertools.islice(planned, job.batch_size * BATCHES))
    sampled = make_batches(job, estimator, sample)
    rate = sampled.timed / sampled.seconds
    size = sampled.size / max(sampled.written, 1) * images
    size *= sampled.written / (sampled.written + sampled.rejected)
    times, shared = speed_up(estimator.device, workers, machine)
    left = tqdm.format_interval(images / rate / times)
    lines += [
        f"about {size / 1e9:.2f} GB to write, estimated from {sampled.written} images",
        f"about {left} with {workers} workers on {shared}: {rate:.1f} images/s of one worker with "
        f"{threads} threads ({sampled.timed} images timed), times {times}",
    ]
    return "\n".join(lines)


def make_batches(job: Job, estimator: Estimator, sample: list[SourceImage]) -> Sampled:
    """Make samples as a worker does, but write none; count and time them."""
    size, written, rejected, seconds, timed = 0, 0, 0, 0.0, 0
    with TemporaryDirectory() as folder:
        builder = ShardBuilder(
            job.source, estimator, Store(folder), job.batch_size, job.resize, settings={}
        )
        for start in range(0, len(sample), job.batch_size):
            batch = sample[start : start + job.batch_size]
            begin = time.monotonic()
            for samples, rejects in builder.make(batch, {}):
                written, rejected = written + len(samples), rejected + len(rejects)
                size += sum(
                    len(s.image) + len(SaliencyMap.quantize(s.saliency).to_png()) for s in samples
                )
            if start or len(sample) <= job.batch_size:
                seconds, timed = seconds + time.monotonic() - begin, timed + len(batch)
    return Sampled(size, written, rejected, seconds, timed)


def speed_up(device: str, workers: int, machine: Machine) -> tuple[int, str]:
    """Return the job's rate as a multiple of one worker's, and the hardware that workers share.

    Workers on one GPU share it, so a GPU counts once, which is the cautious estimate. Workers on
    the CPU count up to the number of cores, but cores that share caches reach less than that.
    """
    if device == "cuda" and machine.devices:
        times = min(workers, machine.devices)
        return times, f"{times} of {machine.devices} GPUs"
    return min(workers, machine.cores), f"{machine.cores} CPU cores"
