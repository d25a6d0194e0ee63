"""From the loader's batch to the weights, no step of a method waits for the GPU.

Tensors on `meta` stand for those on a GPU (`tests.train.host_waits`); `test_gpu.py` has the same
steps on a real one.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet

from pipeline.assemble import View, assemble, count_words, draw_parameters
from pipeline.batch import Batch
from pipeline.recipes import RECIPES, Recipe
from pipeline.rng import BatchRng
from tests.train.host_waits import COPYING, GPU, HostWaits, pretend_gpu, to_device
from tests.train.runs import METHOD_STEPS, method_step
from train.config import TrainConfig
from train.data import split_batch
from train.encoders import ENCODERS
from train.methods import Setup
from train.training_step import TrainingStep, prepare_model_

IMAGES = 8

WAITS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "item": lambda x, host: x.sum().item(),
    "tolist": lambda x, host: x[0, 0].tolist(),
    "branch": lambda x, host: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x, host: x.nonzero(),
    "mask": lambda x, host: x[x > 0],
    "masked assignment": lambda x, host: x.__setitem__(x > 0, x[0]),
    "host index": lambda x, host: x[torch.arange(2)],
    "from the device": lambda x, host: x.cpu(),
    "to the device": lambda x, host: host.to(GPU),
    "without blocking, not pinned": lambda x, host: host.to(GPU, non_blocking=True),
    "into the device": lambda x, host: x.copy_(host),
    "a list": lambda x, host: torch.tensor([1.0, 2.0], device=GPU),
    "a list like another": lambda x, host: x.new_tensor([1.0, 2.0]),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_check_notices(name):
    host = torch.zeros(3, 3)
    with pretend_gpu():
        x = torch.zeros(3, 3, device=GPU)
        with pytest.raises(AssertionError, match="waits for"):
            WAITS[name](x, host)


def test_the_check_accepts_operations_that_do_not_wait():
    host = torch.ones(3)
    with pretend_gpu() as waits:
        moved = COPYING[0].to_device(host, GPU)
        assert moved.device == GPU
        assert (moved * 2 + torch.tensor(1.0)).sum().device == GPU  # a number on the host
        assert host.sum().item() == 3  # from host memory
        assert host[host > 0].tolist() == [1, 1, 1]
        assert waits.operators > 1


def made_batch(recipe: Recipe, waits: HostWaits) -> Batch:
    """Make a batch as the loader does from DALI's output: `pipeline.assemble`, and labels."""
    side, grid = recipe.crop_size, recipe.grid
    corners = np.tile(np.array([0.1, 0.8, 0.9, 0.2], np.float32), (IMAGES, 1))  # flipped

    def view() -> View:
        with waits.building():
            return View(
                torch.empty(IMAGES, side, side, 3, dtype=torch.uint8, device=GPU),
                torch.empty(IMAGES, grid, grid, device=GPU),
                torch.from_numpy(corners),
            )

    rng = BatchRng(0, 0, np.arange(IMAGES), GPU, count_words(recipe))
    key = view() if recipe.pair else None
    fields = assemble(view(), key, recipe, rng, frozenset(), draw_parameters(recipe, rng))
    label = to_device(torch.arange(IMAGES), GPU)
    return Batch(label=label, **{"key": None, "hard_negative": None, **fields})


def built_step(settings: TrainConfig, setup: Setup) -> TrainingStep:
    method = prepare_model_(settings.method.build(setup), settings, torch.device("cpu"))
    return TrainingStep(method.to(GPU), settings, GPU)  # weights on `meta` keep their layout


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    """Build half of a ResNet-18: the same operators, but fewer of them."""
    monkeypatch.setitem(ENCODERS, "resnet18", lambda **_: ResNet(BasicBlock, [1, 1, 1, 1]))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", ["hp", "blur", "mean", "maskco", "none"])
def test_views_are_made_without_waiting(name, is_compiled):
    with pretend_gpu(is_compiled) as waits:
        batch = made_batch(RECIPES[name], waits)
    assert batch.query.device == GPU
    assert waits.operators > 50


@pytest.mark.parametrize("name", METHOD_STEPS)
def test_no_step_waits_for_the_device(name):
    """Check from the loader's batch on, with gradient clipping, and one method in two parts."""
    settings, setup = method_step(name, "cuda", grad_accum_steps=1 + (name == "moco-hp"), clip=1.0)
    with pretend_gpu(is_compiled=True) as waits:
        with waits.building():
            step = built_step(settings, setup)
        batch = made_batch(settings.recipe, waits)
        scalars = step(split_batch(batch, settings.grad_accum_steps), 0.01)
        assert all(value.device == GPU for value in scalars.values())
    assert waits.operators > 300


def test_a_step_that_waits_is_noticed(monkeypatch):
    settings, setup = method_step("moco-hp", "cuda")

    def end_step(self) -> None:
        assert self.queue_next.item() >= 0

    monkeypatch.setattr("train.methods.momentum.MomentumMethod.end_step", end_step)
    with pretend_gpu() as waits:
        with waits.building():
            step = built_step(settings, setup)
        batch = made_batch(settings.recipe, waits)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            step(split_batch(batch, 1), 0.01)
