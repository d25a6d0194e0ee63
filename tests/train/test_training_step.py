"""The mean loss of a step over its micro-batches."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from tests.train.operators import ListOperators
from tests.train.ranks import random_batch
from train.config import TrainConfig
from train.methods import MoCoConfig, Setup
from train.methods.method import Method, OptimizationGroup
from train.optim import OptimConfig
from train.training_step import TrainingStep, prepare_model_


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight * x, "other": x.clone()}


def run_backward(micro_batches: list[Tensor]) -> tuple[Scale, dict[str, Tensor], list[str]]:
    own = SimpleNamespace(config=SimpleNamespace(precision="fp32"), device=torch.device("cpu"))
    model = Scale()
    with ListOperators() as operators:
        scalars = TrainingStep.backward(own, model, micro_batches)  # type: ignore[arg-type]
    return model, scalars, operators.names


@pytest.mark.parametrize("values", [[3.0], [1.0, 5.0], [1.0, 2.0, 6.0]])
def test_scalars_and_gradients_are_means_over_micro_batches(values):
    model, scalars, _ = run_backward([torch.tensor(value) for value in values])
    mean = sum(values) / len(values)
    assert {name: value.item() for name, value in scalars.items()} == pytest.approx(
        {"loss": 2 * mean, "other": mean}
    )
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(mean)
    assert not any(value.requires_grad for value in scalars.values())


def test_nothing_is_averaged_with_one_micro_batch():
    """On a GPU each operator would be a kernel that the host has to launch."""
    one, two = (run_backward([torch.tensor(1.0)] * count)[2] for count in (1, 2))
    assert {"aten::div", "aten::add"}.isdisjoint(one)
    assert "aten::div" in two


class Duel(Method):
    """Two weights that take turns: the loss of `a` is a b x, and that of `b` is -a b x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Turn(self, 3.0, 1), Turn(self, 2.0, -1)
        self.calls: list[str] = []

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def exported(self) -> nn.Module:
        return self.a

    def optimization_groups(self) -> list[OptimizationGroup]:
        return [OptimizationGroup(self.a), OptimizationGroup(self.b, lr_scale=0.5, prefix="b_")]

    def begin_step(self) -> None:
        self.calls.append("begin")

    def end_step(self) -> None:
        self.calls.append("end")


class Turn(nn.Module):
    def __init__(self, duel: Duel, weight: float, sign: int) -> None:
        super().__init__()
        self.weight, self.sign = nn.Parameter(torch.tensor(weight)), sign
        self.__dict__["duel"] = duel  # not as a part of this module

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.duel.calls.append("forward")
        return {"loss": self.sign * self.duel.a.weight * self.duel.b.weight * x}


def test_groups_take_turns_with_their_own_rates_and_clipped_gradients():
    """Two steps of SGD by hand, whose gradients are clipped to 5 and whose second rate differs."""
    optim = OptimConfig(momentum=0.0, weight_decay=0.0, clip_gradient=5.0)
    config = TrainConfig(data="", out="", precision="fp32", optim=optim)
    duel, checked = Duel(), []
    step = TrainingStep(duel, config, torch.device("cpu"))

    def check(scalars):
        values = duel.a.weight, duel.b.weight, scalars["loss"], scalars["gradient_norm"]
        checked.append([value.item() for value in values])

    reported = step([torch.tensor(1.0), torch.tensor(2.0)], 0.1, check)
    # a: loss 3 x 2 x 1.5 = 9, gradient 3, a = 3 - 0.1 x 3 = 2.7
    # b: loss -2.7 x 2 x 1.5 = -8.1, gradient -4.05, b = 2 + 0.05 x 4.05 = 2.2025
    assert checked == [pytest.approx([3, 2, 9, 3]), pytest.approx([2.7, 2, -8.1, 4.05])]
    assert {name: value.item() for name, value in reported.items()} == pytest.approx(
        {"loss": 9, "gradient_norm": 3, "b_loss": -8.1, "b_gradient_norm": 4.05}
    )
    assert duel.b.weight.item() == pytest.approx(2.2025)
    assert duel.calls == ["begin", *["forward"] * 4, "end"]
    step([torch.tensor(4.0)] * 2, 0.01)
    # a: gradient 8.81, clipped to 5, a = 2.7 - 0.01 x 5; b: -10.6, clipped, b = 2.2025 + 0.025
    assert duel.a.weight.item() == pytest.approx(2.65)
    assert duel.b.weight.item() == pytest.approx(2.2275)


@pytest.mark.parametrize("compile_", [False, True])
def test_norms_count_batches_without_a_kernel(compile_):
    """`meta` stands for a GPU; a compiled norm counts in its other kernels."""
    gpu, cpu = torch.device("meta"), torch.device("cpu")
    settings = TrainConfig(data="", out="", method=MoCoConfig(queue=8), compile=compile_)
    method = settings.method.build(Setup(encoder="tiny_norm", batch_size=4))
    with patch("torch.Tensor.cpu", lambda x: torch.zeros_like(x, device=cpu)):  # `meta` has no data
        prepare_model_(method, settings, gpu)
    norms = [module for module in method.modules() if hasattr(module, "running_var")]
    assert [norm.num_batches_tracked.device for norm in norms] == [gpu if compile_ else cpu] * 2
    assert [norm.running_mean.device for norm in norms] == [gpu] * 2
    batch = random_batch(4, hard_negatives=1)
    for name in ("query", "key", "hard_negative"):
        setattr(batch, name, getattr(batch, name).to(gpu))
    with ListOperators() as operators, patch("torch.autocast", lambda *_, **__: nullcontext()):
        method(batch)
    counts = [
        tensors
        for name, tensors in zip(operators.names, operators.tensors, strict=True)
        if name == "aten::add_" and tensors[0].device == gpu
    ]
    assert len(counts) == (3 if compile_ else 0)  # query, key and hard negative
    assert compile_ or [norm.num_batches_tracked.item() for norm in norms] == [1, 2]
