"""What networks draw from torch's global generators, such as the size of an image in detection."""

from unittest.mock import patch

import torch

import train.trainer
from tests.train.runs import config
from train.methods import SimCLRConfig
from train.methods.simclr import SimCLR


def record_draws(out):
    """Train two epochs of two steps; return the first weight and a number drawn in each step."""
    draws, weights, forward = [], [], SimCLR.forward

    def drawing(method, batch):
        weights.append(method.encoder.conv.weight[0, 0, 0, 0].item())
        draws.append(torch.rand(1).item())
        return forward(method, batch)

    settings = config("", out, method=SimCLRConfig(), encoder="tiny", synthetic=16)
    with patch.object(SimCLR, "forward", drawing):
        train.trainer.train(settings)
    return weights[0], draws


def test_ranks_have_equal_weights_and_draw_different_numbers_in_each_step(tmp_path, two_ranks):
    (weight, first), (same_weight, second) = two_ranks(record_draws, tmp_path)
    assert weight == same_weight
    assert len({*first, *second}) == len(first + second) == 8
