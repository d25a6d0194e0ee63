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
