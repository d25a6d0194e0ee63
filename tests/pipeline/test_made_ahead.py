"""What is made ahead of a batch, and errors that are met ahead of it."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from bench.gpu_loader import take
from pipeline import RECIPES, assemble, loader, photometric
from pipeline.crop import HostCrops
from pipeline.fused import pack_parameters
from pipeline.graph import Decoder, StartedBatch, ViewSpec
from pipeline.photometric import Photometric
from pipeline.rng import BatchRng, Rng
from schemas import ShardDataset, UserError
from tests.pipeline.conftest import BATCH, CROP, SAMPLES, same, small, views_of


@pytest.mark.parametrize("name", [name for name in RECIPES if "released" not in name])
def test_every_random_number_is_drawn_ahead(
    dataset: ShardDataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread but the one that reads ahead draws words, and the numbers stay the same."""
    drawing = set()
    draw_blocks = Rng.draw_blocks

    def noted(rng: Rng, count: int) -> np.ndarray:
        drawing.add(threading.current_thread().name)
        return draw_blocks(rng, count)

    monkeypatch.setattr(Rng, "draw_blocks", noted)
    ahead = take(views_of(dataset, name), 1)
    assert drawing == {"read-ahead"}
    monkeypatch.setattr(loader, "count_words", lambda recipe: {})
    monkeypatch.setattr(loader, "draw_parameters", lambda recipe, rng: None)
    assert same(ahead, take(views_of(dataset, name), 1))
    assert len(drawing) > 1


def test_photometric_parameters_are_drawn_ahead(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training thread does not draw them, and they are those that it would draw."""
    drawing = set()
    draw_photometric = photometric.draw_photometric

    def noted(*arguments: Any) -> Photometric:
        drawing.add(threading.current_thread().name)
        return draw_photometric(*arguments)

    monkeypatch.setattr(photometric, "draw_photometric", noted)
    ahead = take(views_of(dataset), 2)
    assert drawing == {"read-ahead"}
    monkeypatch.setattr(loader, "draw_parameters", lambda recipe, rng: None)
    assert same(ahead, take(views_of(dataset), 2))
    assert len(drawing) > 1


def test_parameters_for_a_gpu_are_packed_ahead() -> None:
    recipe, samples = small("hp"), np.arange(5)
    drawn = [
        assemble.draw_parameters(recipe, BatchRng(0, 0, samples, device))
        for device in ("cpu", "meta")
    ]
    for on_cpu, on_gpu in zip(*drawn, strict=True):
        assert on_cpu.table is None
        assert on_gpu.table is not None
        assert torch.equal(on_gpu.table, pack_parameters(on_cpu.photometric, recipe))
    assert len(drawn[0]) == 2
    assert not torch.equal(*(one.photometric.hue for one in drawn[0]))


def test_crops_that_are_made_a_batch_ahead_are_the_same(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crop ahead as for a GPU, but into memory that is not pinned, which needs one."""
    extras = ("masks", "saliency", "windows", "crops", "keys")
    expected = take(views_of(dataset, report=extras), 2 * SAMPLES // BATCH)
    built = []

    class CropsAhead(Decoder):
        def __init__(self, *arguments: Any, stage_for_gpu: bool) -> None:
            super().__init__(*arguments, stage_for_gpu=True)
            built.append(self)

    make_crops = HostCrops.__init__

    def make_without_pinning(crops: HostCrops, *arguments: Any) -> None:
        *others, pinned = arguments
        assert pinned
        make_crops(crops, *others)

    monkeypatch.setattr(loader, "Decoder", CropsAhead)
    monkeypatch.setattr(HostCrops, "__init__", make_without_pinning)
    assert same(expected, take(views_of(dataset, report=extras), 2 * SAMPLES // BATCH))
    assert built


def test_an_error_is_raised_after_the_batches_before_it(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[object] = ["first", "second", UserError("the third is damaged")]

    def start(decoder: Decoder) -> StartedBatch:
        batch = batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        return StartedBatch(batch, [], [])  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "_start", start)
    spec = ViewSpec(CROP, on_device=False)
    decoder = Decoder(iter(()), spec, torch.device("cpu"), BATCH, dataset.url, stage_for_gpu=True)
    assert [next(decoder).prepared for _ in range(2)] == ["first", "second"]
    with pytest.raises(UserError, match="the third is damaged"):
        next(decoder)
