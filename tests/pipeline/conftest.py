"""Small datasets for the tests of the pipeline, local and on a server behind a cache.

Images are PNG, so that pixels can be compared.
"""

import contextlib
import dataclasses
import gc
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.object_store import ObjectServer
from pipeline import RECIPES, Batch, MaskedViews, Recipe, loader
from pipeline import cache as cache_module
from pipeline.cache import Cache, ShardCache
from pipeline.host_threads import get_threads
from pipeline.rng import Purpose, Rng
from pipeline.shard_contents import parse_shard_contents
from schemas import Sample, ShardDataset, write_dataset
from schemas.tables import shard_name

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


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Return whether two batches are equal bit for bit in every field."""

    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # type: ignore[arg-type]

    return len(one) == len(other) and all(
        equal(getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(one, other, strict=True)
        for field in dataclasses.fields(Batch)
    )


def count_threads_left_by(work: Callable[[], object]) -> int:
    """Return how many more threads run after this work than before it; no garbage is collected.

    A forked process that collects the garbage of its parent hangs if it contains DALI's threads.
    """
    get_threads().submit(int).result()  # the thread pool for pixels stays
    gc.collect()
    gc.disable()
    before = count_threads()
    try:
        work()
        with contextlib.suppress(AssertionError):  # DALI's threads end a little later
            wait_until(lambda: count_threads() <= before)
        return max(0, count_threads() - before)
    finally:
        gc.enable()


def count_threads() -> int:
    """Return the number of threads of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))


# --- a remote dataset and its cache ---------------------------------------------------------------

SHARDS = 12
ROOM = 10**9


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `b` of 12 shards of one sample, which tests must not modify."""
    folder = tmp_path_factory.mktemp("store")
    samples = [sample_of(index, picture(index)) for index in range(SHARDS)]
    write_dataset(folder / "b", samples, name="test", classes=["a"] * 12, shard_samples=1)
    return folder


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserve only slightly more than the indices and tables of these small shards take."""
    monkeypatch.setattr(cache_module, "SIDE_BYTES", 128)


@pytest.fixture
def server(store: Path) -> Iterator[ObjectServer]:
    with ObjectServer(store) as server:
        yield server


def interrupt_next(views: MaskedViews, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for a batch, and press Ctrl-C while it is made."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loader, "assemble", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(iter(views))


Open = Callable[..., ShardCache]


@pytest.fixture
def open_cache(server: ObjectServer, tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens a cache of the served dataset, with very short retry delays."""
    opened: list[ShardCache] = []

    def open_(limit: int = ROOM, **options: object) -> ShardCache:
        dataset = ShardDataset.open(f"{server.url}/b")
        options = {"backoff": 0.001, **options}
        opened.append(ShardCache(dataset, Cache(tmp_path / "cache", limit), **options))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for cache in opened:
        cache.prefetch(())


def content(cache: ShardCache, shard: int) -> bytes:
    """Open a shard, compare it with the dataset's files and close it; return the tar."""
    files = cache.open(shard)
    try:
        tar = os.pread(files.tar, ROOM, 0)
    finally:
        os.close(files.tar)
    read = cache.dataset.store.read
    row = next(row for row in cache.dataset.shards if row.shard == shard)
    their_tar, *side_files = (read(shard_name(shard, name)) for name in ("tar", "idx", "parquet"))
    contents = parse_shard_contents(row, *side_files, "")
    assert tar == their_tar
    assert files.contents.keys == contents.keys
    np.testing.assert_array_equal(files.contents.values, contents.values)
    return tar


def present(cache: ShardCache) -> list[int]:
    """Return the numbers of the shards in the folder, in ascending order."""
    return [row.shard for row in cache.dataset.shards if cache.folder.is_present(row)]


def wait_until(is_so: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not true after {seconds} s"
        time.sleep(0.005)


def of_shard(number: int, fault: Callable[[int], str | None]) -> Callable[[str, int], str | None]:
    """Return a fault of one tar that depends on the number of earlier requests for it."""
    return lambda path, before: fault(before) if path.endswith(f"{number:06d}.tar") else None


def sizes(cache: ShardCache) -> list[int]:
    return [cache.estimate_bytes(row) for row in cache.dataset.shards]
