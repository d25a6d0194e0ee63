"""Measure listing, planning, finishing and verifying a large dataset of made-up images."""

import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.process import (
    MemoryWatch,
    call_in_other_process,
    print_timing,
    read_peak_megabytes,
    time_call,
)
from bench.scale_files import measure_equal, measure_extend, measure_preview
from bench.waiting_store import WaitingFileSystem, put
from precompute.sources import SourceImage, list_images, list_source, open_source
from precompute.sources.base import PartedSource
from schemas.cli import lookup
from schemas.dataset import ShardDataset
from schemas.info import describe
from schemas.sample import Sample
from schemas.shard import ShardMarker, marker_to_parquet, write_shard
from schemas.storage import Store
from schemas.tables import SAMPLES_SCHEMA, Reject, ShardRow, shard_name
from schemas.ustar import UstarWriter
from schemas.verify import VerifyOptions, verify_dataset
from schemas.writer import finish_dataset

PER_FOLDER = 10_000
"""Number of made-up images in each part of the source."""


@dataclass(frozen=True)
class Options:
    """Measure seconds and memory of the stages of a job that touch every image but no pixels."""

    rows: tuple[str, ...] = ("list", "plan", "finish")
    """Measurements to run: list (tars in a store with latency), plan (in this process), compare
    (finding the new images for --extend), cluster (planning with Ray), finish (tables, info and
    verify of a dataset with many shards), extend (adding images to such a dataset), preview (a
    contact sheet of it), equal (bytes of the shards of two jobs, one of them planned by Ray, killed
    and resumed).
    """
    images: int = 100_000
    """Number of images for `plan`, `compare`, `cluster` and `equal`."""
    tars: int = 10_000
    """Number of tars for `list`."""
    tar_samples: int = 3
    """Number of samples in each tar for `list`; the samples are small, so that a request takes only
    the store's latency.
    """
    request_seconds: float = 0.02
    """Latency in seconds of a request to the store of `list` and `finish`."""
    shards: int = 10_000
    """Number of shards for `finish`, `extend` and `preview`."""
    shard_samples: int = 10
    """Samples per shard for `finish`, `extend`, `preview` and `equal`."""
    new_images: int = 300
    """Number of images that `extend` adds and `compare` finds."""


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
    (images, _), seconds, cpu = time_call(lambda: list_images(list_source(source)))
    requests = WaitingFileSystem.requests.total()
    WaitingFileSystem.reset(0.0)
    print(
        f"| list {options.tars:,} tars, {len(images):,} samples, {requests:,} requests of "
        f"{1000 * options.request_seconds:.0f} ms | {seconds:.1f} | {cpu:.1f} | "
        f"{read_peak_megabytes():.0f} |"
    )


def measure_plan(options: Options) -> None:
    """List and plan made-up images in this process."""
    from precompute.plan import make_plan

    source, before = MadeUp(options.images), read_peak_megabytes()

    def plan() -> str:
        images, _ = list_images(list_source(source))
        return make_plan(images, seed=0, shard_samples=1000).digest

    digest, seconds, cpu = time_call(plan)
    print(
        f"| plan {options.images:,} images here ({digest[:8]}; {before:.0f} MB before) | "
        f"{seconds:.1f} | {cpu:.1f} | {read_peak_megabytes():.0f} |"
    )


def write_markers(folder: str, count: int) -> None:
    """Write the markers and tables of a dataset of the first `count` made-up images, but no tar."""
    from precompute.plan import make_plan

    images, _ = list_images(list_source(source := MadeUp(count)))
    store = Store(folder)
    shards = make_plan(images, seed=0, shard_samples=1000).shards
    for shard, shard_images in enumerate(shards):
        constant = {"shard": shard, "image_sha256": "0" * 64, "reencoded": False} | dict.fromkeys(
            ("index", "height", "width", "image_bytes", "saliency_min", "saliency_max"), 0
        )
        rows = [
            {"key": image.key, "label": image.label, "source": image.location, **constant}
            for image in shard_images
        ]
        table = pa.Table.from_pylist(rows, SAMPLES_SCHEMA)
        marker = ShardMarker(ShardRow(shard, len(rows), 0, ""), table, [], {})
        with unittest.mock.patch("os.fsync"):
            store.write(shard_name(shard, "parquet"), marker_to_parquet(marker))
    finish_dataset(
        store,
        len(shards),
        name="bench",
        split="train",
        classes=source.classes,
        saliency_side=28,
        estimator={},
        plan="",
        seed=0,
    )


def measure_compare(options: Options) -> None:
    """Find the new images of a source whose other images are in a dataset, in this process."""
    from precompute.extend import select_new

    with tempfile.TemporaryDirectory() as folder:
        call_in_other_process(write_markers, folder, options.images)
        source = MadeUp(options.images + options.new_images)
        images, _ = list_images(list_source(source))
        before = read_peak_megabytes()
        _, new, _ = print_timing(
            f"find {options.new_images:,} new images among {len(images):,} "
            f"({before:.0f} MB when they are listed)",
            lambda: select_new(folder, images, [], list(source.classes)),
        )
    assert len(new) == options.new_images


def measure_cluster(options: Options) -> None:
    """Plan made-up images with a local Ray, and read shards of the plan as workers do."""
    import ray

    from precompute.plan_job import plan_on_cluster
    from precompute.ray_cluster import connect_to_ray

    source, before = MadeUp(options.images), read_peak_megabytes()
    with tempfile.TemporaryDirectory() as folder, connect_to_ray(None):
        store_bytes = ray.cluster_resources().get("object_store_memory", 0)
        with MemoryWatch() as memory:
            listing, seconds, cpu = time_call(
                lambda: plan_on_cluster(source, folder, seed=0, shard_samples=1000)
            )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        shards = listing.plan.shards
        indices = np.linspace(0, len(shards) - 1, min(50, len(shards)), dtype=int).tolist()
        _, reading, _ = time_call(lambda: [shards[index] for index in indices])
    print(
        f"| plan {options.images:,} images by Ray ({listing.plan.digest[:8]}; {before:.0f} MB "
        f"before; largest worker {memory.peak_megabytes:.0f} MB, object store "
        f"{store_bytes / 1e6:.0f} MB; {size / 1e6:.0f} MB of files; a shard is read in "
        f"{1000 * reading / len(indices):.1f} ms) | {seconds:.1f} | {cpu:.1f} | "
        f"{read_peak_megabytes():.0f} |"
    )


def measure_finish(options: Options) -> None:
    """Merge, open, describe and verify a dataset of small images with many shards."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        saliency = np.random.default_rng(0).normal(size=(28, 28)).astype(np.float32)
        with unittest.mock.patch("os.fsync"):  # slow for small files, not part of the measurement
            for shard in range(options.shards):
                first = shard * options.shard_samples
                numbers = range(first, first + options.shard_samples)
                write_shard(store, shard, [make_sample(number, saliency) for number in numbers])
        count = options.shards * options.shard_samples
        size = f"{options.shards:,} shards, {count:,} samples"

        def finish(store: Store) -> ShardDataset:
            return finish_dataset(
                store,
                options.shards,
                name="bench",
                split="train",
                classes=["a"],
                saliency_side=28,
                estimator={},
                plan="",
                seed=0,
            )

        def measure_stage(name: str, work: Callable[[], Any]) -> None:
            print_timing(f"{name} ({size})", work)

        measure_stage("finish", lambda: finish(store))
        measure_stage("open", lambda: ShardDataset.open(folder))
        measure_stage("info", lambda: describe(ShardDataset.open(folder)))
        draw = VerifyOptions(shards=20)
        measure_stage("verify 20 shards", lambda: verify_dataset(ShardDataset.open(folder), draw))
        measure_stage("verify all", lambda: ShardDataset.open(folder).verify())
        WaitingFileSystem.reset(0.0)
        for path in Path(folder, "shards").iterdir():
            put(f"bucket/set/shards/{path.name}", path.read_bytes())
        WaitingFileSystem.seconds = options.request_seconds
        wait = f"{1000 * options.request_seconds:.0f} ms per request"
        measure_stage(f"finish, {wait}", lambda: finish(Store("waiting://bucket/set")))
        measure_stage(f"info, {wait}", lambda: describe(ShardDataset.open("waiting://bucket/set")))
        WaitingFileSystem.reset(0.0)


def make_sample(number: int, saliency: np.ndarray) -> Sample:
    return Sample(f"k{number:09d}", bytes(600), "jpg", saliency, 0, 40, 56, f"a/{number}.jpg")


MEASURES = {
    "list": measure_list,
    "plan": measure_plan,
    "compare": measure_compare,
    "cluster": measure_cluster,
    "finish": measure_finish,
    "extend": lambda options: measure_extend(
        options.shards, options.shard_samples, options.new_images
    ),
    "preview": lambda options: measure_preview(options.shards, options.shard_samples),
    "equal": lambda options: measure_equal(options.images, options.shard_samples),
}


def show(options: Options) -> None:
    """Run each measurement in its own process, so that memory is its own, and print a table."""
    for name in options.rows:
        lookup("row", name, MEASURES)
    print("| what | seconds | CPU seconds of the driver | MB of the driver, peak |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name in options.rows:
        code = f"from bench.scale import *; MEASURES[{name!r}]({options!r})"
        subprocess.run([sys.executable, "-c", code], check=True)
