"""Small datasets for the tests of the pipeline; pictures in PNG, so that pixels can be compared."""

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
"""A small crop keeps these tests fast; seven cells of 8 pixels."""

SAMPLES = 45
SHARD_SAMPLES = 20

# what is seen -> what is stored under each EXIF orientation but 1, which is as seen
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
    """A JPEG file that shows `seen` once its EXIF orientation, 1 to 8, is applied."""
    image = seen.transpose(STORED[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    return buffer.getvalue()


# no draw but the window and the flip
STILL = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "soft_blur_probability": 0.0}


def small(name: str, **changes: object) -> Recipe:
    """A named recipe at the tests' crop."""
    return dataclasses.replace(RECIPES[name], crop_size=CROP, **changes)  # type: ignore[arg-type]


def picture(seed: int) -> np.ndarray:
    """Smooth random colours, (height, width, 3) uint8; the sizes differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    size = (int(random.integers(80, 140)), int(random.integers(80, 140)))
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def sample_of(index: int, pixels: np.ndarray) -> Sample:
    """A sample whose saliency is the picture's own gray."""
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
    """Pixels by key."""
    return {f"key-{index:03d}": picture(index) for index in range(SAMPLES)}


@pytest.fixture(scope="session")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, np.ndarray]
) -> ShardDataset:
    """45 samples in shards of 20, 20 and 5. Not to be written to."""
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
    """Six samples in shards of three, for a test to damage."""
    samples = (sample_of(index, picture(index)) for index in range(6))
    return write_dataset(
        tmp_path / "own", samples, name="test", classes=["a"] * 11, shard_samples=3
    )


Write = Callable[[list[Sample]], ShardDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a dataset of these samples."""
    return lambda samples: write_dataset(
        tmp_path / "written", samples, name="test", classes=["a"] * 11
    )


def rng_of(count: int, seed: int = 0, purpose: Purpose = "query") -> Rng:
    """The random numbers of `count` samples of epoch 0."""
    return Rng(seed, 0, np.arange(count), purpose)


BATCH = 8


def views_of(dataset: ShardDataset, name: str = "hp", **options: Any) -> MaskedViews:
    settings: dict[str, Any] = {"batch_size": BATCH, "device": "cpu", "report": ("keys",)}
    return MaskedViews(dataset.url, small(name), **{**settings, **options})


def take(views: MaskedViews, count: int) -> list[Batch]:
    """The next `count` batches, over the ends of epochs."""
    batches: list[Batch] = []
    while len(batches) < count:
        for batch in views:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches
