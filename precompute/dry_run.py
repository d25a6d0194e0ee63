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
from schemas.counts import format_count
from schemas.saliency import SaliencyMap
from schemas.sample import Sample
from schemas.storage import Store
from schemas.ustar import compute_member_size

BATCHES = 3
"""Number of batches made to measure rate and size; the first one warms up and is not timed."""


@dataclass(frozen=True)
class Machine:
    """The CPU cores and GPUs that the job will have."""

    cores: int
    devices: int

    @classmethod
    def detect(cls) -> "Machine":
        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count())


@dataclass(frozen=True)
class Measurement:
    """Size and time of a few batches.

    Attributes:
        size: bytes that their samples would take in the tars.
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
    plan_indices = [shard - job.first_shard for shard in missing]
    images = sum(map(job.plan.size, plan_indices))
    lines = [
        f"{job.plan.describe()} in {job.out}; already rejected: "
        f"{format_count(len(job.rejects), 'input')}",
        f"missing: {format_count(len(missing), 'shard')}, {format_count(images, 'image')}",
    ]
    if not images:
        return "\n".join(lines)
    workers, cpus, _ = resources.split(machine.cores, machine.devices, len(missing))
    threads = max(1, int(cpus))
    use_threads(threads)
    limit_torch_threads(estimator)
    planned = (image for index in plan_indices for image in job.plan.shards[index])
    sample = list(itertools.islice(planned, job.batch_size * BATCHES))
    measurement = measure_batches(job, estimator, sample)
    rate = measurement.timed / measurement.seconds
    size = measurement.size / (measurement.written + measurement.rejected) * images
    speedup, hardware = estimate_speedup(estimator.device, workers, machine)
    duration = tqdm.format_interval(images / rate / speedup)
    lines += [
        f"about {size / 1e9:.2f} GB to write, estimated from "
        f"{format_count(measurement.written, 'image')}",
        f"about {duration} with {format_count(workers, 'worker')} on {hardware}: {rate:.1f} "
        f"images/s per worker with {format_count(threads, 'thread')} (measured on "
        f"{format_count(measurement.timed, 'image')}), speedup {speedup}x",
    ]
    return "\n".join(lines)


def measure_batches(job: Job, estimator: Estimator, sample: list[SourceImage]) -> Measurement:
    """Make samples as a worker does without writing them; count and time them."""
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
                size += sum(map(compute_tar_size, samples))
            if start or len(sample) <= job.batch_size:
                seconds, timed = seconds + time.monotonic() - begin, timed + len(batch)
    return Measurement(size, written, rejected, seconds, timed)


def compute_tar_size(sample: Sample) -> int:
    """Return the bytes of a sample in a tar: its members, each with a header and padding."""
    saliency = SaliencyMap.quantize(sample.saliency).to_png()
    members = [sample.image, saliency, str(sample.label), *sample.members.values()]
    return sum(compute_member_size(len(content)) for content in members)


def estimate_speedup(device: str, workers: int, machine: Machine) -> tuple[int, str]:
    """Return the job's rate as a multiple of one worker's, and the hardware that workers share.

    Workers on one GPU share it, so a GPU counts once, which is the cautious estimate. Workers on
    the CPU count up to the number of cores, but cores that share caches reach less than that.
    """
    if device == "cuda" and machine.devices:
        speedup = min(workers, machine.devices)
        return speedup, f"{speedup} of {format_count(machine.devices, 'GPU')}"
    return min(workers, machine.cores), format_count(machine.cores, "CPU core")
