"""Fixtures shared by tests of several packages: small pictures, small datasets, the real data."""

import contextlib
import io
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas import Sample

# Real photos and weights for development; they are not part of the project.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def photos() -> Path:
    """Return a folder of ImageNet photos at their original size, in one class folder."""
    return existing(DATA / "photos")


@pytest.fixture(scope="session")
def mobilenet_weights() -> Path:
    """Return the path of torchvision's ImageNet weights of mobilenet_v2, in float16."""
    return existing(DATA / "weights" / "mobilenet_v2_imagenet_f16.pt")


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Provide one Ray that all jobs of this process share in turn: starting one takes seconds.

    Its workers inherit the environment of its start. A file that does not exist is named there as
    the configuration of AWS; a test that writes it, in this place, can have them use its own S3.
    """
    from precompute.ray_cluster import connect_to_ray  # imported here: most tests need no Ray
    from tests.ray_workers import forked_workers

    aws = tmp_path_factory.mktemp("ray") / "aws"
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_CONFIG_FILE", str(aws))
            patch.setenv("RAY_worker_niceness", "0")  # by default all other tests come first
            stack.enter_context(forked_workers())
            stack.enter_context(connect_to_ray(None))
        yield aws


def existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"real data is not here: {path.relative_to(DATA.parents[1])}")
    return path


def encode(pixels: np.ndarray, image_format: str = "JPEG", **options: object) -> bytes:
    """Encode (height, width, 3) uint8 pixels as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    """Return smooth random colors, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """Return `make_sample(index, classes=3)`, which builds a sample determined by its index."""

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
def reproducible() -> Iterator[None]:
    """Give each test the same random numbers and threads, alone or after any other test.

    Commands that run in this process set the number of threads, on which the last bits of a
    training depend.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch = sys.modules.get("torch")  # tests of `schemas` alone do not import torch
    if torch:
        torch.manual_seed(0)
        threads = torch.get_num_threads()
    yield
    if torch:
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests for two workers, and skip those marked `gpu` where there is none."""
    items[:] = order_for_two_workers(items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # imported here: tests of `schemas` alone need no torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def order_for_two_workers(items: list[pytest.Item]) -> list[pytest.Item]:
    """Put what takes long, and what shares a fixture that takes long, first in either half.

    `--dist worksteal` gives each of two workers a half, and whoever is ready first takes from the
    end of what the other has left. So at the end there are short tests, and one worker alone starts
    the shared Ray and the other alone the ranks and the runs of tests/train.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    train = Path(__file__).parent / "train"

    def rank(item: pytest.Item) -> int:
        return 2 * (train not in item.path.parents) + (item.path not in slow)

    by_rank = [[item for item in items if rank(item) == number] for number in range(4)]
    others = [*by_rank[2], *by_rank[3]]
    first_half = others[: max(len(items) // 2, len(by_rank[2]))]
    return [*first_half, *by_rank[0], *by_rank[1], *others[len(first_half) :]]
