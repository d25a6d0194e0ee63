"""Small datasets for the tests of the pipeline; images are PNG, so that pixels can be compared."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import RECIPES, Batch, MaskedViews, Recipe
from pipeline.rng import Purpose, Rng
from schemas import Sample, ShardDataset, write_dataset

CROP = 56
"""Crop size of seven cells of 8 pixels, small to keep the tests fast."""

SAMPLES = 45
SHARD_SAMPLES = 20

# transpositions from the visible image to the stored one, by EXIF orientation (1 stores it as is)
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(seen: Image.Image, orientation: int) -> bytes:
    """Return a JPEG file that shows `seen` after its EXIF orientation, 1 to 8, is applied."""
    image = seen.transpose(STORED[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    return buffer.getvalue()


# no randomness except for the crop and the flip
STILL = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "soft_blur_probability": 0.0}


def small(name: str, **changes: object) -> Recipe:
    """Return a named recipe with the crop size of the tests."""
    return dataclasses.replace(RECIPES[name], crop_size=CROP, **changes)  # type: ignore[arg-type]


def picture(seed: int) -> np.ndarray:
    """Return smooth random colors, (height, width, 3) uint8, of random size."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    size = (int(random.integers(80, 140)), int(random.integers(80, 140)))
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def sample_of(index: int, pixels: np.ndarray) -> Sample:
    """Return a sample whose saliency is the gray of its image."""
    gray = Image.fromarray(pixels).convert("L").resize((28, 28), Image.Resampling.BOX)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return Sample(
        key=f"key-{index:03d}",
        image=buffer.getvalue(),
        extension="png",
        saliency=np.asarray(gray, np.float32),
        label=index % 12 - 1,
        height=pixels.shape[0],
        width=pixels.shape[1],
    )


@pytest.fixture(scope="session")
def pictures() -> dict[str, np.ndarray]:
    """Pixels of the images by sample key."""
    return {f"key-{index:03d}": picture(index) for index in range(SAMPLES)}


@pytest.fixture(scope="session")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, np.ndarray]
) -> ShardDataset:
    """A dataset of 45 samples in shards of 20, 20 and 5, which tests must not modify."""
    samples = (sample_of(index, pixels) for index, pixels in enumerate(pictures.values()))
    return write_dataset(
        tmp_path_factory.mktemp("pipeline") / "dataset",
        samples,
        name="test",
        classes=[str(index) for index in range(11)],
        shard_samples=SHARD_SAMPLES,
    )


@pytest.fixture
def own_dataset(tmp_path: Path) -> ShardDataset:
    """A dataset of six samples in shards of three, which a test may damage."""
    samples = (sample_of(index, picture(index)) for index in range(6))
    return write_dataset(
        tmp_path / "own", samples, name="test", classes=["a"] * 11, shard_samples=3
    )


Write = Callable[[list[Sample]], ShardDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a dataset of given samples."""
    return lambda samples: write_dataset(
        tmp_path / "written", samples, name="test", classes=["a"] * 11
    )


def rng_of(count: int, seed: int = 0, purpose: Purpose = "query") -> Rng:
    """Return the random numbers of `count` samples in epoch 0."""
    return Rng(seed, 0, np.arange(count), purpose)


BATCH = 8


def views_of(dataset: ShardDataset, name: str = "hp", **options: Any) -> MaskedViews:
    settings: dict[str, Any] = {"batch_size": BATCH, "device": "cpu", "report": ("keys",)}
    return MaskedViews(dataset.url, small(name), **{**settings, **options})


def take(views: MaskedViews, count: int) -> list[Batch]:
    """Return the next `count` batches, across epochs."""
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in views:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches
