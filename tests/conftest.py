"""What tests of several rooms share: small pictures, small datasets, the real data beside us."""

import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas import Sample

# Real photos and weights for development; they are no part of the project.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def photos() -> Path:
    """A folder of ImageNet photos of their original size, in one class folder."""
    return existing(DATA / "photos")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """ImageNet weights of torchvision's mobilenet_v2, float16."""
    return existing(DATA / "weights" / "mobilenet_v2_imagenet_f16.pt")


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A Ray that the jobs of this process use one after the other: starting one takes seconds."""
    from precompute.cluster import cluster  # here: most tests need no Ray

    with cluster(None):
        yield


def existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data is not here: {path.relative_to(DATA.parents[1])}")
    return path


def encode(pixels: np.ndarray, image_format: str = "JPEG", **options: object) -> bytes:
    """(height, width, 3) uint8 -> an image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Smooth random colours, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """`make_sample(index, classes=3)`: a sample that follows from its index."""

    def make(index: int, classes: int = 3, side: int = 28) -> Sample:
        pixels = noise(index)
        saliency = np.random.default_rng(index).normal(size=(side, side)).astype(np.float32)
        return Sample(
            key=f"sample-{index:04d}",
            image=encode(pixels),
            extension="jpg",
            saliency=saliency,
            label=index % classes,
            height=pixels.shape[0],
            width=pixels.shape[1],
            source=f"class/{index}.jpg",
        )

    return make


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers in every run, alone or beside others."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if torch := sys.modules.get("torch"):  # tests of `schemas` alone need none
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, so that tests of `schemas` alone need no torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
