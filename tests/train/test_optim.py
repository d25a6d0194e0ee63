import math

import pytest
import torch

from train.optim import build_sgd, learning_rate


def test_cosine_from_peak_to_zero():
    rates = [learning_rate(step, peak=0.4, total=10) for step in range(10)]
    assert rates[0] == 0.4
    assert rates[5] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(0.2 * (1 + math.cos(0.9 * math.pi)))


def test_warmup_is_linear_and_meets_the_cosine():
    rates = [learning_rate(step, peak=0.4, total=12, warmup=4) for step in range(12)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.2)


def test_sgd_leaves_frozen_parameters_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    (group,) = build_sgd(model, momentum=0.8, weight_decay=0.1).param_groups
    assert len(group["params"]) == 2
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.1)
