"""Measure listing, planning, finishing and verifying a large dataset of made-up images."""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.waiting_store import WaitingFileSystem, put
from precompute.sources import SourceImage, list_images, list_source, open_source
from precompute.sources.base import PartedSource
from schemas.dataset import ShardDataset
from schemas.info import describe
from schemas.sample import Sample
from schemas.shard import write_shard
from schemas.storage import Store
from schemas.tables import Reject
from schemas.ustar import UstarWriter
from schemas.verify import VerifyOptions, verify_dataset
from schemas.writer import finish_dataset

PER_FOLDER = 10_000
"""Number of made-up images in each part of the source."""


@dataclass(frozen=True)
class Options:
    """Measure seconds and memory of the stages of a job that touch every image but no pixels."""

    rows: tuple[str, ...] = ("list", "plan", "finish")
    """Measurements to run: list (tars in a store with latency), plan (in this process), cluster
    (planning with Ray), finish (tables, info and verify of a dataset with many shards).
    """
    images: int = 100_000
    """Number of images for `plan` and `cluster`."""
    tars: int = 10_000
    """Number of tars for `list`."""
    tar_samples: int = 3
    """Number of samples in each tar for `list`; the samples are small, so that a request takes only
    the store's latency.
    """
    request_seconds: float = 0.02
    """Latency in seconds of a request to the store of `list` and `finish`."""
    shards: int = 10_000
    """Number of shards for `finish`."""
    shard_samples: int = 10
    """Samples per shard for `finish`."""


class MadeUp(PartedSource):
    """Made-up images in folders of PER_FOLDER, with keys and locations like ImageNet's."""

    def __init__(self, count: int):
        self.count = count
        self.classes = [f"n{label:08d}" for label in range(1000)]

    def parts(self) -> Sequence[str]:
        return [str(first) for first in range(0, self.count, PER_FOLDER)]

    def list_part(self, part: str) -> Iterator[SourceImage | Reject]:
        for number in range(int(part), min(int(part) + PER_FOLDER, self.count)):
            label = number % 1000
            name = f"n{label:08d}_{number:09d}"
            folder = f"n{label:08d}"
            yield SourceImage(f"{folder}_{name}", f"{folder}/{name}.JPEG", label)

    def read(self, image: SourceImage) -> bytes:
        raise NotImplementedError


def peak_megabytes() -> float:
    """Return the peak memory of this process in MB (getrusage would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of `work`, its seconds, and the CPU seconds of this process."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu


def measure_list(options: Options) -> None:
    """List the tars of a store that delays each request."""
    tar = UstarWriter()
    for number in range(options.tar_samples):
        tar.add(f"{number:05d}.jpg", bytes(1000))
        tar.add(f"{number:05d}.cls", b"1")
    WaitingFileSystem.reset(0.0)
    for number in range(options.tars):
        put(f"bucket/tars/{number:05d}.tar", tar.getvalue())
    WaitingFileSystem.seconds = options.request_seconds
    source = open_source("webdataset", "waiting://bucket/tars", "train", False)
    (images, _), seconds, cpu = timed(lambda: list_images(list_source(source)))
    requests = WaitingFileSystem.requests.total()
    WaitingFileSystem.reset(0.0)
    print(
        f"| list {options.tars:,} tars, {len(images):,} samples, {requests:,} requests of "
        f"{1000 * options.request_seconds:.0f} ms | {seconds:.1f} | {cpu:.1f} | "
        f"{peak_megabytes():.0f} |"
    )


def measure_plan(options: Options) -> None:
    """List and plan made-up images in this process."""
    from precompute.plan import make_plan

    source, before = MadeUp(options.images), peak_megabytes()

    def plan() -> str:
        images, _ = list_images(list_source(source))
        return make_plan(images, seed=0, shard_samples=1000).digest

    digest, seconds, cpu = timed(plan)
    print(
        f"| plan {options.images:,} images here ({digest[:8]}; {before:.0f} MB before) | "
        f"{seconds:.1f} | {cpu:.1f} | {peak_megabytes():.0f} |"
    )


def measure_cluster(options: Options) -> None:
    """Plan made-up images with a local Ray, and read shards of the plan as workers do."""
    import ray

    from precompute.cluster import cluster
    from precompute.plan_job import plan_on_cluster

    source, before = MadeUp(options.images), peak_megabytes()
    with tempfile.TemporaryDirectory() as folder, cluster(None):
        store_bytes = ray.cluster_resources().get("object_store_memory", 0)
        with MemoryWatch() as memory:
            found, seconds, cpu = timed(
                lambda: plan_on_cluster(source, folder, seed=0, shard_samples=1000)
            )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        shards = found.plan.shards
        places = np.linspace(0, len(shards) - 1, min(50, len(shards)), dtype=int).tolist()
        _, reading, _ = timed(lambda: [shards[place] for place in places])
    print(
        f"| plan {options.images:,} images by Ray ({found.plan.digest[:8]}; {before:.0f} MB "
        f"before; largest worker {memory.most:.0f} MB, object store {store_bytes / 1e6:.0f} MB; "
        f"{size / 1e6:.0f} MB of files; a shard is read in {1000 * reading / len(places):.1f} ms) "
        f"| "
        f"{seconds:.1f} | {cpu:.1f} | {peak_megabytes():.0f} |"
    )


class MemoryWatch:
    """Track the largest Ray worker in MB, without the object store that all of them share."""

    def __init__(self) -> None:
        self.most = 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.over.wait(0.5):
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                if is_worker(command):
                    self.most = max(self.most, private_megabytes(command.parent))

    def __enter__(self) -> "MemoryWatch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def is_worker(command: Path) -> bool:
    """Return whether a process is a Ray worker, by its /proc/PID/cmdline."""
    try:
        return command.read_bytes().startswith(b"ray::")
    except OSError:  # the process has ended
        return False


def private_megabytes(process: Path) -> float:
    """Return a process's private memory in MB; 0 if it has ended."""
    try:
        fields = (process / "statm").read_text().split()
    except OSError:
        return 0.0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_finish(options: Options) -> None:
    """Merge, open, describe and verify a dataset of small images with many shards."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        saliency = np.random.default_rng(0).normal(size=(28, 28)).astype(np.float32)
        with unittest.mock.patch("os.fsync"):  # slow for small files, not part of the measurement
            for shard in range(options.shards):
                first = shard * options.shard_samples
                numbers = range(first, first + options.shard_samples)
                write_shard(store, shard, [small(number, saliency) for number in numbers])
        count = options.shards * options.shard_samples
        what = f"{options.shards:,} shards, {count:,} samples"

        def finish(place: Store) -> ShardDataset:
            return finish_dataset(
                place,
                options.shards,
                name="bench",
                split="train",
                classes=["a"],
                saliency_side=28,
                estimator={},
                plan="",
                seed=0,
            )

        def row(name: str, work: Callable[[], Any]) -> None:
            _, seconds, cpu = timed(work)
            peak = peak_megabytes()
            print(f"| {name} ({what}) | {seconds:.1f} | {cpu:.1f} | {peak:.0f} |", flush=True)

        row("finish", lambda: finish(store))
        row("open", lambda: ShardDataset.open(folder))
        row("info", lambda: describe(ShardDataset.open(folder)))
        draw = VerifyOptions(shards=20)
        row("verify 20 shards", lambda: verify_dataset(ShardDataset.open(folder), draw))
        row("verify all", lambda: ShardDataset.open(folder).verify())
        WaitingFileSystem.reset(0.0)
        for path in Path(folder, "shards").iterdir():
            put(f"bucket/set/shards/{path.name}", path.read_bytes())
        WaitingFileSystem.seconds = options.request_seconds
        wait = f"{1000 * options.request_seconds:.0f} ms a request"
        row(f"finish, {wait}", lambda: finish(Store("waiting://bucket/set")))
        row(f"info, {wait}", lambda: describe(ShardDataset.open("waiting://bucket/set")))
        WaitingFileSystem.reset(0.0)


def small(number: int, saliency: np.ndarray) -> Sample:
    return Sample(f"k{number:09d}", bytes(600), "jpg", saliency, 0, 40, 56, f"a/{number}.jpg")


MEASURES = {
    "list": measure_list,
    "plan": measure_plan,
    "cluster": measure_cluster,
    "finish": measure_finish,
}


def show(options: Options) -> None:
    """Run each measurement in its own process, so that memory is its own, and print a table."""
    print("| what | seconds | CPU seconds of the driver | MB of the driver, peak |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name in options.rows:
        code = f"from bench.scale import *; MEASURES[{name!r}]({options!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
