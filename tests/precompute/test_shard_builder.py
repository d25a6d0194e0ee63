"""Tests of a builder's threads: their concurrency, their lifetime and their failures."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from precompute import decode as decode_module
from precompute import shard_builder
from precompute.estimators import ScdaOptions, scda
from precompute.reencode import Resize
from precompute.shard_builder import PACKED_LATER, Handover, ShardBuilder
from precompute.sources import Source, SourceImage
from precompute.sources.base import LOCAL_READERS, REMOTE_READERS, count_readers
from schemas import UserError
from schemas.shard import read_marker
from schemas.storage import Store
from tests.conftest import encode, noise
from tests.precompute.conftest import batch

JPEGS = [encode(noise(index)) for index in range(4)]
IMAGES = [SourceImage(f"k{index:03d}", f"{index}.jpg", 0) for index in range(40)]


class InMemory(Source):
    """Source of images in memory; `on_read` is called before each read."""

    def __init__(self, on_read: Callable[[], object] = lambda: None):
        self.on_read = on_read

    def images(self) -> Iterator[SourceImage]:
        return iter(IMAGES)

    def read(self, image: SourceImage) -> bytes:
        self.on_read()
        return JPEGS[int(image.key[1:]) % len(JPEGS)]


class Flat:
    """Fake estimator that raises `error` in call number `fails_at`."""

    side, weights_sha256, device, network_on_gpu = 2, None, "cpu", False

    def __init__(self, error: Exception | None = None, fails_at: int = 0):
        self.error, self.fails_at, self.calls = error, fails_at, 0

    def __call__(self, images: Any) -> np.ndarray:
        self.calls += 1
        if self.error and self.calls == self.fails_at:
            raise self.error
        return np.stack([np.eye(2, dtype=np.float32) for _ in images])


def build(
    out: Path, source: Source | None = None, estimator: Any = None, shards: int = 1
) -> ShardBuilder:
    builder = ShardBuilder(
        source or InMemory(), estimator or Flat(), Store(out), 4, Resize(), settings={}
    )
    for shard in range(shards):
        builder.build(shard, IMAGES)
    return builder


def test_all_images_are_written_in_the_order_of_the_plan(tmp_path: Path) -> None:
    build(tmp_path, shards=2)
    for shard in range(2):
        marker = read_marker(Store(tmp_path), shard)
        assert marker.samples["key"].to_pylist() == [image.key for image in IMAGES]


def test_decoding_and_packing_each_stay_in_one_thread_over_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI keeps its decoders by thread, so a new thread per shard would recreate them."""
    threads: dict[str, list[int]] = {"decode": [], "pack": []}
    decode, write_shard = shard_builder.decode, shard_builder.write_shard

    def remember(name: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            threads[name].append(threading.get_ident())
            return function(*arguments)

        return call

    monkeypatch.setattr(shard_builder, "decode", remember("decode", decode))
    monkeypatch.setattr(shard_builder, "write_shard", remember("pack", write_shard))
    build(tmp_path, shards=3)
    assert len(threads["decode"]) == 3 * len(IMAGES) / 4
    assert len(threads["pack"]) == 3
    assert len({*threads["decode"]}) == len({*threads["pack"]}) == 1
    assert len({*threads["decode"], *threads["pack"], threading.get_ident()}) == 3


def test_as_many_images_are_read_at_a_time_as_there_are_readers(tmp_path: Path) -> None:
    """Each reader waits until all are reading, which are more than the 4 images of a batch."""
    together = threading.Barrier(LOCAL_READERS)
    builder = build(tmp_path, InMemory(lambda: together.wait(timeout=20)))
    assert builder.read_at_once == LOCAL_READERS
    assert len(read_marker(Store(tmp_path), 0).samples) == len(IMAGES)


def test_a_remote_source_is_read_by_more_readers(tmp_path: Path) -> None:
    source = InMemory()
    assert count_readers(source) == LOCAL_READERS
    source.store = Store(tmp_path)  # type: ignore[attr-defined]
    assert count_readers(source) == LOCAL_READERS
    source.store = Store("memory://photos")  # type: ignore[attr-defined]
    assert count_readers(source) == REMOTE_READERS


@pytest.mark.parametrize("fails_at", [1, 3, 10])
def test_an_estimator_that_fails_writes_nothing_and_the_next_shard_is_whole(
    tmp_path: Path, fails_at: int
) -> None:
    estimator = Flat(ValueError("no map"), fails_at)
    builder = ShardBuilder(InMemory(), estimator, Store(tmp_path), 4, Resize(), {})
    with pytest.raises(ValueError, match="no map"):
        builder.build(0, IMAGES)
    assert not list(tmp_path.rglob("*.*"))
    builder.build(1, IMAGES)
    assert len(read_marker(Store(tmp_path), 1).samples) == len(IMAGES)


class FailsOnGray(Flat):
    """Fake estimator that fails on every batch with an image of constant color."""

    def __call__(self, images: Any) -> np.ndarray:
        if any(np.asarray(image.cpu()).std() == 0 for image in images.tensors):
            raise self.error or ZeroDivisionError("no contrast")
        return super().__call__(images)


def make_gray(monkeypatch: pytest.MonkeyPatch, *indices: int) -> None:
    gray = encode(np.full((8, 8, 3), 128, np.uint8))
    jpegs = [gray if index in indices else jpeg for index, jpeg in enumerate(JPEGS)]
    monkeypatch.setattr(f"{__name__}.JPEGS", jpegs)


def test_an_estimator_that_fails_on_one_image_rejects_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gray(monkeypatch, 2)
    builder, progress = build(tmp_path, estimator=FailsOnGray(), shards=0), []
    marker = builder.build(0, IMAGES, lambda *counts: progress.append(counts))
    assert [sum(counts) for counts in zip(*progress, strict=True)] == [30, 10]
    gray = [image for image in IMAGES if int(image.key[1:]) % len(JPEGS) == 2]
    assert [(reject.source, *reject[1:]) for reject in marker.rejects] == [
        (image.location, "estimator-fails", "ZeroDivisionError: no contrast") for image in gray
    ]
    assert len(marker.samples) == len(IMAGES) - len(gray)


def test_an_estimator_that_works_rejects_a_batch_without_any_good_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gray(monkeypatch, 2)
    gray = [image for image in IMAGES if int(image.key[1:]) % len(JPEGS) == 2]
    builder = ShardBuilder(InMemory(), FailsOnGray(), Store(tmp_path), 4, Resize(), {})
    marker = builder.build(0, [*IMAGES[:2], *IMAGES[3:5], *gray[:8]])
    assert (len(marker.samples), len(marker.rejects)) == (4, 8)


def test_one_value_that_is_not_finite_rejects_its_image_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gray(monkeypatch, 2)

    class Unstable(Flat):
        def __call__(self, images: Any) -> np.ndarray:
            maps = super().__call__(images)
            maps[[image.shape[0] == 8 for image in images], 0, 1] = np.nan  # the gray images
            return maps

    build(tmp_path, estimator=Unstable())
    marker = read_marker(Store(tmp_path), 0)
    assert (len(marker.samples), len(marker.rejects)) == (30, 10)


def test_an_estimator_that_takes_no_image_ends_the_job_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_gray(monkeypatch, *range(len(JPEGS)))
    with pytest.raises(ZeroDivisionError, match="no contrast"):
        build(tmp_path, estimator=FailsOnGray())
    assert not list(tmp_path.rglob("*.*"))


def test_a_gpu_that_fails_while_one_image_is_looked_for_rejects_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimator fails on a batch, and then with a CUDA error on the first single image."""
    make_gray(monkeypatch, 2)

    class Breaks(FailsOnGray):
        def __call__(self, images: Any) -> np.ndarray:
            if len(images.tensors) == 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return super().__call__(images)

    with pytest.raises(UserError, match=r"the estimator fails .*illegal memory access"):
        build(tmp_path, estimator=Breaks())
    assert not list(tmp_path.rglob("*.*"))


def test_memory_that_runs_out_in_the_estimator_is_one_line(tmp_path: Path) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ..."
    estimator = Flat(torch.OutOfMemoryError(text), 2)
    with pytest.raises(UserError, match="the estimator fails, out of memory") as raised:
        build(tmp_path, estimator=estimator)
    assert "--gpus-per-worker 1" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_gpu_that_fails_after_the_first_batch_writes_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A regression would write a shard of the first batch and reject all other images."""
    calls = []
    decode_batch = decode_module.decode_batch

    def break_after_one(images: list) -> Any:
        calls.append(images)
        if len(calls) > 1:
            raise RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700):\nillegal")
        return decode_batch(images)

    monkeypatch.setattr(decode_module, "decode_batch", break_after_one)
    with pytest.raises(UserError, match="cudaErrorIllegalAddress"):
        build(tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_a_packer_that_fails_ends_the_shard_at_once(tmp_path: Path) -> None:
    """The estimator must neither continue with a shard that cannot be written nor wait forever."""
    estimator = Flat()
    builder = ShardBuilder(InMemory(), estimator, Store(tmp_path), 4, Resize(), {})
    with pytest.raises(ValueError, match="twice in shard 0"):
        builder.build(0, [IMAGES[0]] * 4 + IMAGES * 10)
    assert estimator.calls < 50


def test_few_groups_wait_for_the_packer() -> None:
    """Otherwise a slow disk would fill the memory with samples."""
    packer, handover = Mock(spec=Future), Handover[int]()
    packer.done.return_value = False
    for number in range(PACKED_LATER):
        assert handover.put([number], packer)
    packer.done.side_effect = [False, True]
    assert not handover.put([PACKED_LATER], packer)


def test_a_group_of_images_goes_to_the_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transfer from a GPU waits for it, so there is one per group, not per forward pass."""
    estimator = ScdaOptions("resnet18", "random", size=32, areas=(1.0, 0.2)).build()
    monkeypatch.setattr(scda, "WINDOWS_AT_ONCE", {"cpu": 8})
    cpu = torch.Tensor.cpu
    shapes = []

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", remember)
    maps = estimator(batch(noise(0), noise(1, 60, 30)))
    assert maps.shape == (2, 28, 28)
    ((windows, *_),) = shapes
    assert windows > 2 * 8, "one forward pass was enough"


def test_a_gpu_takes_the_windows_of_all_areas_together() -> None:
    estimator = ScdaOptions("resnet18", "random", size=32).build("cpu")
    levels = [scda.list_places([(375, 500)] * 32, area) for area in (1.0, 0.45)]
    assert [len(level) for level in levels] == [32, 256]

    def lengths(device: str) -> list[int]:
        estimator.device = device  # type: ignore[misc]
        return [len(chunk) for chunk in estimator.split_windows(levels)]  # type: ignore[attr-defined]

    assert lengths("cuda") == [256, 32]
    assert lengths("cpu") == [32, 64, 64, 64, 64]


def test_folded_batch_norms_give_the_same_map() -> None:
    """The network as a GPU runs it, run on the CPU, equals the original to within rounding."""
    torch.manual_seed(0)
    estimator = ScdaOptions("resnet18", "random", size=64, precision="fp32").build("cpu")
    trunk = estimator.trunk  # type: ignore[attr-defined]
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    folded = scda.fold_batch_norms(trunk)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected, found = trunk(inputs)["map"], folded(inputs)["map"]
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    norms = [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not norms


@pytest.mark.gpu
def test_scda_on_a_gpu_agrees_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cells may differ between the foregrounds, computed by the rule of the views."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # full fp32 precision
    images = [noise(index, 200 + 10 * index, 300) for index in range(8)]
    for precision, most in (("fp32", 0.01), ("bf16", 0.03)):
        options = ScdaOptions("resnet18", "random", precision=precision)
        on_gpu = options.build()(decoded_on_gpu(images))
        on_cpu = options.build("cpu")(batch(*images))
        differ = (foreground(on_gpu) != foreground(on_cpu)).mean()
        assert differ < most, precision


def decoded_on_gpu(images: list[np.ndarray]) -> Any:
    return batch(*images).to_device("gpu")  # type: ignore[attr-defined]


def foreground(maps: np.ndarray) -> np.ndarray:
    mean = maps.mean(axis=(1, 2), keepdims=True)
    return maps >= mean - 0.6 * maps.std(axis=(1, 2), keepdims=True)
