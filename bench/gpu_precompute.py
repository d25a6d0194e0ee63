"""Measure how fast workers compute saliency: the network alone, then 1, 2 and 3 workers.

Workers are plain processes, without Ray, so that this runs on a machine with a GPU and few
packages: torch, torchvision, DALI, numpy, pyarrow, fsspec and pillow are enough. A small version of
it runs on a CPU.
"""

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from bench.process import find_missing

NEEDED = ("torch", "torchvision", "nvidia.dali", "numpy", "pyarrow", "fsspec", "PIL")

GAIN = 0.95
"""Share of the best rate of fewer workers that more workers must reach, to allow for noise."""


@dataclass(frozen=True)
class Settings:
    """Size of the measurement. The defaults are for a GPU; `small()` is for a test on a CPU.

    Attributes:
        backbone: a torchvision network; its weights are random, which does not change its speed.
        images, shards: numbers for each worker.
        height, width: pixels of each image, about ImageNet's.
        batch_size: images per batch of a worker.
        forwards: number of timed forward passes of the network alone.
        workers: numbers of parallel processes, measured one after the other.
        start_seconds: maximum time until all workers are warm.
        areas: areas of the estimator's windows, as shares of an image; None for its own default.
    """

    backbone: str = "resnet50"
    images: int = 2000
    shards: int = 2
    height: int = 375
    width: int = 500
    batch_size: int = 32
    forwards: int = 40
    workers: tuple[int, ...] = (1, 2, 3)
    start_seconds: float = 180.0
    areas: tuple[float, ...] | None = None

    @classmethod
    def small(cls) -> "Settings":
        return cls(
            "squeezenet1_1", 6, 2, 48, 64, batch_size=2, forwards=1, workers=(1, 2), areas=(1.0,)
        )

    def build_estimator_options(self) -> Any:
        """Return `ScdaOptions` with random weights."""
        from precompute.estimators import ScdaOptions

        options = ScdaOptions(self.backbone, "random")
        return options if self.areas is None else replace(options, areas=self.areas)


def measure(settings: Settings) -> Iterator[str]:
    """Measure the network alone, then workers in parallel; yield each line as soon as it is known.

    Raises:
        AssertionError: before the first line if a package is missing; after the last one if a
            worker failed, or more workers are slower than fewer.
    """
    missing = find_missing(NEEDED)
    assert not missing, f"not installed here: {', '.join(missing)}"
    network, windows = measure_network(settings), count_windows(settings)
    counted = f"{settings.backbone}, {windows} windows per image"
    yield f"network alone: {network:.0f} windows/s ({counted})"
    if line := measure_compiled_network(settings):
        yield line
    best = 0.0
    problems = []
    for count in settings.workers:
        try:
            rate, cpu = run_workers(settings, count)
        except RuntimeError as error:
            problems.append(f"{count} workers: {error}")
            continue
        yield (
            f"{count} workers: {rate:.1f} images/s, {rate * windows:.0f} windows/s, "
            f"{rate * windows / network:.0%} of the network alone, {cpu:.2f} CPU ms per image"
        )
        if rate < GAIN * best:
            problems.append(f"{count} workers give {rate:.1f} images/s, fewer gave {best:.1f}")
        best = max(best, rate)
    assert not problems, "; ".join(problems)


def count_windows(settings: Settings) -> int:
    """Return the number of windows per image."""
    from precompute.estimators.windows import list_windows

    areas = settings.build_estimator_options().areas
    return sum(len(list_windows(settings.height, settings.width, area)) for area in areas)


def measure_network(settings: Settings, compile_: bool = False) -> float:
    """Time forward passes on windows that are already on the device; return windows/s."""
    import torch

    from precompute.estimators.scda import WINDOWS_AT_ONCE, ScdaEstimator

    options = replace(settings.build_estimator_options(), compile=compile_)
    estimator = ScdaEstimator(options)
    shape = (WINDOWS_AT_ONCE[estimator.device], options.size, options.size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=estimator.device)
    with torch.inference_mode():
        estimator.aggregate(pixels).sum().item()
        start = time.perf_counter()
        for _ in range(settings.forwards):
            maps = estimator.aggregate(pixels)
        maps.sum().item()  # waits for all of them
        seconds = time.perf_counter() - start
    return settings.forwards * len(pixels) / seconds


def measure_compiled_network(settings: Settings) -> str | None:
    """Return a line with the rate of the compiled network; None where it cannot be compiled."""
    import torch

    from pipeline.compiling import find_compile_obstacle

    if not torch.cuda.is_available() or find_compile_obstacle(torch.device("cuda", 0)):
        return None
    try:
        return f"network compiled: {measure_network(settings, compile_=True):.0f} windows/s"
    except Exception as error:  # the workers are still worth measuring
        return f"the network could not be compiled: {error}"


def run_workers(settings: Settings, count: int) -> tuple[float, float]:
    """Run processes that build their shards at the same time.

    Returns:
        Rate of all processes together in images/s, from the moment when all are warm, and CPU
        milliseconds per image.

    Raises:
        RuntimeError: a worker failed or did not start in time.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // count)  # as the job shares the cores
    context = multiprocessing.get_context("spawn")  # a forked child cannot use its parent's CUDA
    warm = context.Barrier(count)
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=run_worker,
                args=(settings, threads, Path(folder) / str(n), warm, results),
                daemon=True,
            )
            for n in range(count)
        ]
        for process in processes:
            process.start()
        reports = list(collect(processes, results, settings))
        for process in processes:
            process.join()
    if errors := [report for report in reports if isinstance(report, str)]:
        raise RuntimeError("; ".join(sorted({*errors})))
    begins, ends, cpus = zip(*reports, strict=True)
    images = count * settings.images
    return images / (max(ends) - min(begins)), 1000 * sum(cpus) / images


def collect(
    processes: list[Any], results: Any, settings: Settings
) -> Iterator[tuple[float, float, float] | str]:
    """Yield one report for each process; a process that died reports its exit code."""
    import queue

    reported = 0
    while reported < len(processes):
        try:
            yield results.get(timeout=1.0)
            reported += 1
        except queue.Empty:
            dead = [process.exitcode for process in processes if process.exitcode]
            if dead:
                for process in processes:  # the others would wait for it at the barrier
                    process.terminate()
                yield f"a worker died (exit code {dead[0]})"
                return


def run_worker(settings: Settings, threads: int, out: Path, warm: Barrier, results: Any) -> None:
    """Build shards of generated photos in a child process; report begin, end and CPU seconds.

    Times come from `time.monotonic`, which all processes of a machine share.
    """
    from precompute.threads import limit_torch_threads, use_threads

    try:
        use_threads(threads)
        builder, plans = prepare(settings, out)
        limit_torch_threads(builder.estimator)
        builder.build(0, plans[0][: 2 * settings.batch_size])
        warm.wait(settings.start_seconds)
        begin, cpu = time.monotonic(), time.process_time()
        for shard, images in enumerate(plans):
            written = builder.build(shard, images)
            if len(written.samples) != len(images):
                raise ValueError(f"{len(written.rejects)} valid images were rejected")
        results.put((begin, time.monotonic(), time.process_time() - cpu))
    except Exception as error:  # the parent prints it
        warm.abort()
        results.put(f"{type(error).__name__}: {error}")


def prepare(settings: Settings, out: Path) -> tuple[Any, list[list[Any]]]:
    """Return a ShardBuilder over generated photos in memory, and the images of each shard."""
    import numpy as np
    from PIL import Image

    from precompute.reencode import Resize
    from precompute.shard_builder import ShardBuilder
    from precompute.sources import Source, SourceImage
    from schemas.storage import Store

    class Photos(Source):
        """JPEGs of ImageNet's size: smooth colors with noise, about 100 KB each."""

        def __init__(self) -> None:
            self.jpegs = []
            rng = np.random.default_rng(0)
            for _ in range(16):
                size = (settings.width, settings.height)
                coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                smooth = np.asarray(Image.fromarray(coarse).resize(size), np.int16)
                noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255)
                buffer = io.BytesIO()
                Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=92)
                self.jpegs.append(buffer.getvalue())

        def images(self) -> Iterator[SourceImage]:
            return (SourceImage(f"{n:06d}", str(n), 0) for n in range(settings.images))

        def read(self, image: SourceImage) -> bytes:
            return self.jpegs[int(image.location) % len(self.jpegs)]

    source = Photos()
    estimator = settings.build_estimator_options().build()
    images = list(source.images())
    size = -(-len(images) // settings.shards)
    plans = [images[start : start + size] for start in range(0, len(images), size)]
    builder = ShardBuilder(source, estimator, Store(out), settings.batch_size, Resize(), {})
    return builder, plans


if __name__ == "__main__":
    try:
        for line in measure(Settings()):
            print(line, flush=True)
    except AssertionError as error:
        raise SystemExit(f"FAIL precompute: {error}") from None
    print("PASS precompute")
