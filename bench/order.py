"""Measure the seconds and the memory that planning a batch of a very large dataset takes."""

import time
from dataclasses import dataclass

import numpy as np

from bench.process import call_in_other_process, read_peak_megabytes
from pipeline.order import SHUFFLE_SHARDS, SampleOrder
from schemas.errors import UserError


@dataclass(frozen=True)
class Options:
    """Measure the seconds and the memory to plan the first batch, at any epoch and step."""

    shards: int = 100_000
    """Number of shards."""
    shard_samples: int = 10_000
    """Samples per shard."""
    batch_size: int = 4096
    """Samples per global batch."""
    shuffle_shards: int = SHUFFLE_SHARDS
    """Number of shards whose samples are shuffled together."""
    streams: tuple[int, ...] = (1, 8)
    """Numbers of streams to measure."""


def measure(options: Options, streams: int) -> str:
    """Plan two batches in this process, which has a peak of memory of its own; return the row."""
    before = read_peak_megabytes()
    start = time.perf_counter()
    sizes = np.full(options.shards, options.shard_samples)
    order = SampleOrder(sizes, options.batch_size, 1, options.shuffle_shards, streams)
    if order.steps < 3:
        raise UserError("fewer than three batches; give a smaller --batch-size")
    step = order.steps // 2
    order.batch(57, step)
    planned = time.perf_counter()
    order.batch(57, step + 1)
    end = time.perf_counter()
    return (
        f"| {streams} | {planned - start:.2f} | {1e3 * (end - planned):.2f} | "
        f"{read_peak_megabytes() - before:.0f} |"
    )


def build_table(options: Options) -> str:
    """Plan one batch in the middle of epoch 57 for each number of streams; return the table."""
    samples = options.shards * options.shard_samples
    lines = [
        f"{samples:,} samples in {options.shards:,} shards, batch {options.batch_size}, windows of "
        f"{options.shuffle_shards} shards",
        "",
        "| streams | seconds | next step, ms | MB beyond the imported packages |",
        "| ---: | ---: | ---: | ---: |",
    ]
    lines += [call_in_other_process(measure, options, streams) for streams in options.streams]
    return "\n".join(lines)
