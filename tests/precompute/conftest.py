import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pytest
from PIL import Image

from precompute.estimators import SpectralOptions
from precompute.plan import make_plan
from precompute.resume import find_missing_shards
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, list_images
from precompute.sources.trees import Folder
from schemas import ShardDataset
from schemas.storage import Store
from schemas.tables import SHARD_FOLDER
from tests.conftest import encode, noise

if TYPE_CHECKING:  # it needs Ray, which a machine that only runs the tests on a GPU may lack
    from precompute.job import Job


def run_here(*arguments: object) -> int:
    """Run the command in this process, which saves seconds of imports per call."""
    from precompute.__main__ import main  # it needs Ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["precompute", *map(str, arguments)])
        return main()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, except the lock and stats.json, which has a duration."""
    others = ("stats.json", ".lock")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in others)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content or encode(noise(len(str(path)))))


def listed(source: Source) -> dict[str, tuple[str, int]]:
    """Return key and label by location; assert that nothing is rejected and images can be read."""
    images, rejects = list_images(source.images())
    assert not rejects
    for image in images:
        Image.open(io.BytesIO(source.read(image))).load()
    return {image.location: (image.key, image.label) for image in images}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "precompute", *map(str, arguments)]


def precompute(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=300
    )


def without_ray(job: "Job") -> ShardDataset:
    """Run a job in this process, without Ray."""
    store, settings = Store(job.out), job.settings(None)
    store.make_folder(SHARD_FOLDER)
    shards = list(range(len(job.plan.shards)))
    estimator = job.estimator.build()
    builder = ShardBuilder(job.source, estimator, store, job.batch_size, job.resize, settings)
    assert find_missing_shards(store, settings, job.default_settings) == shards
    for shard, part in enumerate(job.plan.shards):
        builder.build(shard, part)
    assert find_missing_shards(store, settings, job.default_settings) == []
    dataset = job.finish(store, settings, saliency_side=28)
    assert dataset.verify().clean
    return dataset


def build_folder(root: Path, out: Path, **changes: object) -> ShardDataset:
    """Build the dataset of a folder with the `spectral` estimator, in this process."""
    from precompute.job import Job

    source = Folder(str(root), "train", False)
    images, rejects = list_images(source.images())
    plan = make_plan(images, seed=0, shard_samples=1000)
    job = Job("folder", "train", source, plan, rejects, SpectralOptions(), 0, str(out), 32)
    return without_ray(replace(job, **changes))


def batch(*images: np.ndarray) -> object:
    return ndd.as_batch(list(images))
