"""Batch normalization over uneven ranks with GPU kernels, replaced by stand-ins here."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.train.host_waits import GPU, pretend_gpu
from train.distributed import rank, world_size
from train.sync_bn import FusedGlobalNorm

EPS, MOMENTUM = 1e-5, 0.1


def axes(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def columns(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def stats(x, eps):
    mean = x.mean(axes(x))
    return mean, (x.var(axes(x), correction=0) + eps).rsqrt()


def gather_stats(x, means, scales, running_mean, running_var, momentum, eps, counts):
    """Merge the ranks one by one as ATen/native/cuda/Normalization.cuh does."""
    average = squares = total = torch.zeros_like(means[0])
    for mean, scale, count in zip(means, scales, counts, strict=True):
        variance = (1 / scale).square() - eps
        factor = 1 / (total + count)
        squares = squares + variance * count + (average - mean).square() * total * count * factor
        average = total * factor * average + count * factor * mean
        total = total + count
    running_mean.lerp_(average, momentum)
    running_var.lerp_(squares / (total - 1), momentum)
    return average, (squares / total + eps).rsqrt()


def elemt(x, weight, bias, mean, scale, eps):
    return (x - columns(mean, x)) * columns(scale * weight, x) + columns(bias, x)


def backward_reduce(gradient, x, mean, scale, weight, *needed):
    sums = gradient.sum(axes(x))
    products = (gradient * (x - columns(mean, x))).sum(axes(x))
    return sums, products, products * scale, sums


def backward_elemt(gradient, x, mean, scale, weight, sums, products, counts):
    total = counts.sum()
    slope = columns(scale.square() * products / total, x)
    centered = gradient - columns(sums / total, x) - (x - columns(mean, x)) * slope
    return centered * columns(weight * scale, x)


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Replace kernels that exist only on GPUs by formulas."""
    with (
        patch.object(torch, "batch_norm_stats", stats),
        patch.object(torch, "batch_norm_gather_stats_with_counts", gather_stats),
        patch.object(torch, "batch_norm_elemt", elemt),
        patch.object(torch, "batch_norm_backward_reduce", backward_reduce),
        patch.object(torch, "batch_norm_backward_elemt", backward_elemt),
    ):
        yield


def normalized_share(values, shares):
    """Normalize this rank's share; return result, gradients and running statistics."""
    assert world_size() == len(shares)
    x = values.split(shares)[rank()].clone().requires_grad_()
    weight, bias = weights(values.shape[1])
    running = torch.zeros(values.shape[1]), torch.ones(values.shape[1])
    with kernels():
        result = FusedGlobalNorm.apply(x, weight, bias, *running, EPS, MOMENTUM)
        (result**3).sum().backward()
    return result.detach(), x.grad, weight.grad, bias.grad, *running


def weights(channels):
    start = torch.linspace(0.5, 1.5, channels)
    return start.clone().requires_grad_(), (start - 1).requires_grad_()


@pytest.mark.parametrize("shares", [[3, 1, 2, 2], [0, 3, 0, 5]])
@pytest.mark.parametrize("sides", [(5, 4), ()])
def test_uneven_ranks_normalize_as_one(four_ranks, shares, sides):
    """The first rank may have no values; its count of 0 would divide 0 by 0."""
    values = 2 + torch.randn(8, 3, *sides, generator=torch.Generator().manual_seed(0))
    whole = values.double().requires_grad_()
    norm = (torch.nn.BatchNorm2d if sides else torch.nn.BatchNorm1d)(3, EPS, MOMENTUM).double()
    with torch.no_grad():
        for own, start in zip((norm.weight, norm.bias), weights(3), strict=True):
            own.copy_(start)
    expected = norm(whole)
    (expected**3).sum().backward()
    answers = four_ranks(normalized_share, values, shares)
    result, slope = (torch.cat([one[place] for one in answers]).double() for place in (0, 1))
    torch.testing.assert_close(result, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slope, whole.grad, atol=1e-4, rtol=1e-4)
    for place, own in ((2, norm.weight), (3, norm.bias)):
        total = sum(one[place].double() for one in answers)
        torch.testing.assert_close(total, own.grad, atol=1e-3, rtol=1e-4)
    for one in answers:
        torch.testing.assert_close(one[4].double(), norm.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one[5].double(), norm.running_var, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 0])
def test_the_host_does_not_wait_for_the_counts_of_ranks(size):
    with pretend_gpu() as waits, kernels(), patch("torch.distributed.all_reduce") as reduce:
        x = torch.empty(size, 3, 4, 4, device=GPU).requires_grad_()
        weight, bias, *running = (torch.empty(3, device=GPU).requires_grad_() for _ in range(4))
        running = [one.detach() for one in running]
        FusedGlobalNorm.apply(x, weight, bias, *running, EPS, MOMENTUM).sum().backward()
    assert reduce.call_count == 1
    assert waits.operators > 20
