"""The mean loss of a step over its micro-batches."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.train.operators import ListOperators
from train.training_step import TrainingStep


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
