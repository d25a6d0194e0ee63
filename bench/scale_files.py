"""Measure jobs on files of tiny images: extend, preview, and equality of the shards of two jobs."""

import contextlib
import hashlib
import io
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from bench.process import call_in_other_process, print_timing, read_peak_megabytes
from schemas.sample import Sample
from schemas.shard import write_shard
from schemas.storage import Store
from schemas.tables import CARD

# Precompute, Ray, torch and DALI are imported in the functions that need them: other measurements
# start without their memory.
if TYPE_CHECKING:
    from precompute.__main__ import Options
    from precompute.job import Job

SIDE = 8
"""Side of the images in pixels."""
CLASSES = 10
NEW_SHARD_SAMPLES = 100
"""Samples per shard of an extension."""
POLL_SECONDS = 0.05


def write_images(root: Path, numbers: Iterable[int]) -> None:
    """Write JPEG files of noise, in one folder per class."""
    for label in range(CLASSES):
        (root / f"class{label}").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="JPEG")
        path = root / f"class{number % CLASSES}" / f"{number:08d}.jpg"
        path.write_bytes(content.getvalue())


def build_job_options(folder: Path, shard_samples: int) -> "Options":
    """Return the options of a precompute job that reads `folder/root` and writes `folder/out`."""
    from precompute.__main__ import Options
    from precompute.estimators import SpectralOptions

    return Options(
        dataset="folder",
        root=str(folder / "root"),
        out=str(folder / "out"),
        shard_samples=shard_samples,
        workers=1,
        estimator=SpectralOptions(),
    )


def write_with_made_up_maps(folder: Path, shards: int, shard_samples: int) -> None:
    """Write images and their dataset as a job would, except that all maps are the same noise."""
    write_images(folder / "root", range(shards * shard_samples))
    saliency = np.random.default_rng(0).normal(size=(28, 28)).astype(np.float32)
    with contextlib.ExitStack() as stack:
        job = resolve_quietly(build_job_options(folder, shard_samples), stack)
    store, settings = Store(job.out), job.settings(None)
    with unittest.mock.patch("os.fsync"):  # slow for small files, not part of the measurement
        for shard, images in enumerate(job.plan.shards):
            samples = [
                Sample(
                    *(image.key, job.source.read(image), "jpg", saliency, image.label),
                    *(SIDE, SIDE, image.location),
                )
                for image in images
            ]
            write_shard(store, shard, samples, settings=settings)
    job.finish(store, settings, saliency_side=28)


def resolve_quietly(options: "Options", stack: contextlib.ExitStack) -> "Job":
    """List and plan as the command does, without printing."""
    from precompute.__main__ import resolve

    with contextlib.redirect_stdout(None):
        return resolve(options, stack)


def measure_extend(shards: int, shard_samples: int, new_images: int) -> None:
    """Add new images to a dataset with many shards, as `saliency-precompute --extend` does."""
    from precompute.job import Resources, run_job
    from precompute.ray_cluster import connect_to_ray

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        call_in_other_process(write_with_made_up_maps, folder, shards, shard_samples)
        count = shards * shard_samples
        write_images(folder / "root", range(count, count + new_images))
        options = replace(build_job_options(folder, NEW_SHARD_SAMPLES), extend=True)
        before = read_peak_megabytes()
        job = print_timing(
            f"extend {shards:,} shards of {shard_samples} samples: list {count + new_images:,} "
            f"files and find {new_images:,} new ones ({before:.0f} MB before)",
            lambda: resolve_quietly(options, stack),
        )
        assert job.plan.images == new_images
        print_timing("extend: start Ray", lambda: stack.enter_context(connect_to_ray(None)))
        summary = print_timing(
            f"extend: estimate the new images in {len(job.plan.shards)} shards and write the "
            "tables",
            lambda: run_job(job, Resources(workers=1)),
        )
        print(f"| of which building shards | {summary.at_work:.1f} | | |", flush=True)
        assert len(summary.dataset) == count + new_images


def measure_preview(shards: int, shard_samples: int) -> None:
    """Write a contact sheet of a dataset with many shards."""
    from pipeline.preview import write_preview
    from pipeline.recipes import RECIPES

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call_in_other_process(write_with_made_up_maps, folder, shards, shard_samples)
        before = read_peak_megabytes()
        print_timing(
            f"preview of 12 samples of {shards:,} shards of {shard_samples} samples "
            f"({before:.0f} MB before)",
            lambda: write_preview(folder / "out", RECIPES["hp"], folder / "preview.png"),
        )


def measure_equal(images: int, shard_samples: int) -> None:
    """Compare the shards of an uninterrupted job with those of one planned by Ray and killed once.

    The first job is planned by the driver. The driver process of the second one gets SIGKILL when
    half of the shards are written, and the same command is run again.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "root", range(images))
        started = time.perf_counter()
        run_command(folder, "one", shard_samples, "driver")
        uninterrupted = time.perf_counter() - started
        killed_at = kill_halfway(folder, "two", shard_samples, "cluster")
        started = time.perf_counter()
        run_command(folder, "two", shard_samples, "cluster")
        resumed = time.perf_counter() - started
        first_hashes, second_hashes = (
            hash_files(folder / out / "shards") for out in ("one", "two")
        )
    differing = sum(
        first_hashes.get(file) != second_hashes.get(file)
        for file in first_hashes.keys() | second_hashes.keys()
    )
    print(
        f"| job of {images:,} images, planned by the driver | {uninterrupted:.0f} | | |\n"
        f"| the same, planned by Ray, killed with {killed_at:,} shards written and resumed | "
        f"{resumed:.0f} after the kill | | |\n"
        f"| files in shards/: {len(first_hashes):,} and {len(second_hashes):,}; {differing:,} "
        "differ in their sha256 | | | |",
        flush=True,
    )
    assert differing == 0


def build_command(folder: Path, out: str, shard_samples: int, plan: str) -> list[str]:
    """Return the command of a job that reads `folder/root` and writes `folder/out`."""
    return [
        *(sys.executable, "-m", "precompute", "--dataset", "folder"),
        *("--root", str(folder / "root"), "--out", str(folder / out), "--plan", plan),
        *("--shard-samples", str(shard_samples), "--estimator", "spectral", "--workers", "1"),
    ]


def run_command(folder: Path, out: str, shard_samples: int, plan: str) -> None:
    """Run a job to its end; its progress goes to stderr."""
    command = build_command(folder, out, shard_samples, plan)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def kill_halfway(folder: Path, out: str, shard_samples: int, plan: str) -> int:
    """Start a job and kill its driver process when half of the shards are written.

    Returns:
        The number of complete shards after all processes of the job have ended.
    """
    images = sum(1 for _ in (folder / "root").rglob("*.jpg"))
    half = -(-images // shard_samples) // 2
    job = subprocess.Popen(
        build_command(folder, out, shard_samples, plan),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    while count_markers(folder / out) < half:
        if job.poll() is not None:
            raise RuntimeError("the job ended before it could be killed")
        time.sleep(POLL_SECONDS)
    job.kill()
    job.wait()
    find = ["pgrep", "-s", str(job.pid)]
    while subprocess.run(find, check=False, stdout=subprocess.DEVNULL).returncode == 0:
        time.sleep(POLL_SECONDS)
    assert not (folder / out / CARD).exists()
    return count_markers(folder / out)


def count_markers(out: Path) -> int:
    """Return the number of complete shards in a folder."""
    return sum(1 for _ in out.glob("shards/*.parquet"))


def hash_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file in a folder by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
