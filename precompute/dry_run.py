"""--dry-run: what a job would do, without writing anything."""

import time
from tempfile import TemporaryDirectory

import nvidia.dali.experimental.dynamic as ndd
import torch
from tqdm import tqdm

from precompute.job import Job
from precompute.resume import missing_shards
from precompute.shard_builder import ShardBuilder
from schemas.saliency import SaliencyMap
from schemas.storage import Store

BATCHES = 3
"""Batches that are made to measure rate and size; the first one warms up and is not timed."""


def estimate_job(job: Job, cores: int) -> str:
    """Images, shards, bytes and time of a job, from a few batches made in one process on one core.

    Nothing is written. Raises UserError as the job itself would.
    """
    estimator = job.estimator.build()
    missing = missing_shards(Store(job.out), job.settings(estimator.weights_sha256))
    plans = [job.plan.shards[shard - job.first_shard] for shard in missing]
    images = sum(map(len, plans))
    lines = [
        f"{job.plan.images} images -> {len(job.plan.shards)} shards in {job.out}; "
        f"{len(job.rejects)} inputs are rejected already",
        f"missing: {len(missing)} shards, {images} images",
    ]
    if not images:
        return "\n".join(lines)
    sample = [image for plan in plans for image in plan][: job.batch_size * BATCHES]
    torch.set_num_threads(1)
    ndd.set_num_threads(1)
    with TemporaryDirectory() as folder:
        builder = ShardBuilder(
            job.source, estimator, Store(folder), job.batch_size, job.resize, settings={}
        )
        size, made, rejected, seconds, timed = 0, 0, 0, 0.0, 0
        for start in range(0, len(sample), job.batch_size):
            batch = sample[start : start + job.batch_size]
            begin = time.monotonic()
            for samples, rejects in builder.make(batch, {}):
                made, rejected = made + len(samples), rejected + len(rejects)
                size += sum(
                    len(s.image) + len(SaliencyMap.quantise(s.saliency).to_png()) for s in samples
                )
            if start or len(sample) <= job.batch_size:
                seconds, timed = seconds + time.monotonic() - begin, timed + len(batch)
    rate = timed / seconds
    share = size / max(made, 1) * images * made / (made + rejected)
    left = tqdm.format_interval(images / rate / cores)
    lines += [
        f"about {share / 1e9:.2f} GB to write, by {made} of them",
        f"about {left} on {cores} cores, at {rate:.1f} images/s on one (of {timed} images; "
        "cores that share caches give less)",
    ]
    return "\n".join(lines)
