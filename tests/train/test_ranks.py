"""One global batch over 1, 2 and 4 ranks, in one part and in two, against float64 loops.

The formulas are in `tests.train.oracle`; their gradients are central differences at some entries of
each weight. Tolerance: 2e-5 absolute and 1e-3 relative, of float32 and its sums in other orders.
"""

import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.train import oracle
from tests.train.ranks import random_batch
from train.config import TrainConfig
from train.distributed import rank, world_size
from train.methods import MoCoConfig, Setup, SimCLRConfig, SupervisedConfig
from train.optim import OptimConfig
from train.sync_bn import GlobalBatchNorm
from train.training_step import TrainingStep, prepare_model_

SIZE, QUEUE, RHO, TAU, EMA = 8, 11, 1.7, 0.3, 0.5
CPU = torch.device("cpu")
METHODS = {
    "moco": MoCoConfig(queue=QUEUE, projection=5, rho=RHO, temperature=TAU, ema_momentum=EMA),
    "simclr": SimCLRConfig(projection=5, rho=RHO, temperature=TAU),
    "simclr-keys": SimCLRConfig(projection=5, rho=RHO, temperature=TAU, hard_for_keys=True),
    "supervised": SupervisedConfig(),
}


def build(name: str, norm: bool, grad_accum_steps: int = 1):
    """Build a method, with SyncBN if it has norms; its momentum branch differs from the encoder."""
    encoder = "tiny_norm" if norm else "tiny"
    config = TrainConfig(
        data="", out="", batch_size=SIZE, grad_accum_steps=grad_accum_steps, precision="fp32",
        sync_bn=norm, optim=OptimConfig(lr=0.1),
    )  # fmt: skip
    torch.manual_seed(0)
    setup = Setup(encoder=encoder, sync_bn=norm, batch_size=SIZE, classes=3)
    method = prepare_model_(METHODS[name].build(setup), config, CPU)
    with torch.no_grad():
        for parameter_name, parameter in method.named_parameters():
            if parameter_name.startswith("momentum_"):
                parameter.add_(0.1)
    return method, TrainingStep(method, config, CPU)


def one_step(name: str, norm: bool, hard: int, grad_accum_steps: int = 1):
    """Make a step on this rank's share; return loss, gradients, queue, statistics, new weights."""
    method, step = build(name, norm, grad_accum_steps)
    whole, share = random_batch(SIZE, hard), SIZE // world_size()
    mine = slice(rank() * share, (rank() + 1) * share)
    micro_batches = []
    for first in range(mine.start, mine.stop, share // grad_accum_steps):
        rows = slice(first, first + share // grad_accum_steps)
        views = None
        if hard:
            views = torch.cat([view[rows] for view in whole.hard_negative.split(SIZE)])
        micro_batches.append(
            SimpleNamespace(
                query=whole.query[rows],
                key=whole.key[rows],
                hard_negative=views,
                label=whole.label[rows],
            )
        )
    loss = step(micro_batches, lr=0.1)["loss"].item()
    gradients = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    return loss, gradients, method.state_dict()


def arrays(state, prefix=""):
    """Return the weights of a branch, named without its prefix."""
    found = {
        key.removeprefix(prefix): value.double().numpy().copy()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    return {key: value for key, value in found.items() if key.split(".")[0] in BRANCH}


BRANCH = ("encoder", "head", "classifier")


@cache
def reference(name: str, norm: bool, hard: int):
    """Return the loss and slopes of some entries of each weight: (loss, [(name, index, slope)])."""
    method, _ = build(name, norm)
    weights, batch = arrays(method.state_dict()), random_batch(SIZE, hard)
    if name == "moco":
        momentum = arrays(method.state_dict(), "momentum_")
        moved = {k: EMA * momentum[k] + (1 - EMA) * weights[k] for k in momentum}
        queue = method.queue.double().numpy()
        key = oracle.embed(batch.key, moved)

    def loss():
        views = batch.hard_negative.split(SIZE) if hard else []
        if name == "supervised":
            logits = oracle.features(batch.query, weights) @ weights["classifier.weight"].T
            logits = logits + weights["classifier.bias"]
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            return -np.mean([np.log(shares[i, batch.label[i]]) for i in range(SIZE)])
        q = oracle.embed(batch.query, weights)
        if name == "moco":
            z = [oracle.embed(view, moved) for view in views]
            own = [[z[j][i] for j in range(hard)] for i in range(SIZE)]
            return oracle.moco_loss(q, key, queue, own, rho=RHO, tau=TAU)
        z = [oracle.embed(view, weights) for view in views]
        own = [[z[j][i] for j in range(hard)] for i in range(SIZE)]
        k = oracle.embed(batch.key, weights)
        keys = name == "simclr-keys"
        return oracle.simclr_loss(q, k, own, rho=RHO, tau=TAU, hard_for_keys=keys)

    slopes = []
    generator = np.random.default_rng(0)
    for weight, _ in method.named_parameters():
        if weight not in weights:
            continue
        for _ in range(4):
            index = tuple(generator.integers(0, weights[weight].shape))
            start, rise = weights[weight][index], []
            for change in (1e-5, -1e-5):
                weights[weight][index] = start + change
                rise.append(loss())
            weights[weight][index] = start
            slopes.append((weight, index, (rise[0] - rise[1]) / 2e-5))
    return loss(), slopes


CASES = [
    *[("moco", norm, hard, 1) for norm in (False, True) for hard in (0, 1, 3)],
    *[("simclr", norm, hard, 1) for norm in (False, True) for hard in (0, 1, 3)],
    ("simclr-keys", True, 1, 1),
    ("supervised", True, 0, 1),
    ("moco", False, 3, 2),
    ("supervised", False, 0, 2),
]


@pytest.mark.parametrize(("name", "norm", "hard", "grad_accum_steps"), CASES)
def test_any_split_equals_the_formula(two_ranks, four_ranks, name, norm, hard, grad_accum_steps):
    expected, slopes = reference(name, norm, hard)
    case = (name, norm, hard, grad_accum_steps)
    runs = {1: [one_step(*case)], 2: two_ranks(one_step, *case), 4: four_ranks(one_step, *case)}
    for size, answers in runs.items():
        assert np.mean([loss for loss, _, _ in answers]) == pytest.approx(expected, abs=1e-5), size
        for _, gradients, state in answers:
            for weight, index, slope in slopes:
                found = gradients[weight][index].item()
                assert found == pytest.approx(slope, abs=2e-5, rel=1e-3), (size, weight)
            for key, value in runs[1][0][2].items():
                if key not in ("queue", "_extra_state"):  # see below
                    torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-4)
    if name == "moco":
        queues = [state["queue"] for answers in runs.values() for *_, state in answers]
        queues = [queue[queue[:, 0].argsort()] for queue in queues]
        for queue in queues[1:]:
            torch.testing.assert_close(queue, queues[0], atol=1e-6, rtol=0)


def shuffling_state():
    method, step = build("moco", norm=False)
    step([random_batch(SIZE // world_size(), 1)], lr=0.1)
    return method.generator.get_state(), method.queue


def test_ranks_keep_drawing_the_same_permutations(four_ranks):
    """All ranks hold the same queue, bit for bit."""
    first, *others = four_ranks(shuffling_state)
    assert all(torch.equal(first[0], other[0]) for other in others)
    assert all(torch.equal(first[1], other[1]) for other in others)
    assert not torch.equal(first[0], build("moco", norm=False)[0].generator.get_state())


def with_and_without_a_stop():
    """Return weights after six steps: in one go, and with a new DDP after the second step."""

    def go_on(method, step, first):
        for number in range(first, 6):
            step([random_batch(2, 1, seed=10 * number + rank())], lr=0.1)
        return torch.cat([parameter.detach().flatten() for parameter in method.parameters()])

    method, step = build("moco", norm=False)
    for number in range(2):
        step([random_batch(2, 1, seed=10 * number + rank())], lr=0.1)
    states = copy.deepcopy((method.state_dict(), step.state_dict()))
    whole = go_on(method, step, 2)
    method, step = build("moco", norm=False)
    method.load_state_dict(states[0])
    step.load_state_dict(states[1])
    return whole, go_on(method, step, 2)


def test_where_ddp_keeps_a_gradient_does_not_matter(four_ranks):
    """DDP assigns buckets again after the first step; two ranks would not show it."""
    for whole, stopped in four_ranks(with_and_without_a_stop):
        assert torch.equal(whole, stopped)


def normalize_share(values):
    share = values.split([1, 3, 2, 2])[rank()].requires_grad_()
    norm = GlobalBatchNorm.convert(torch.nn.BatchNorm2d(3))
    result = norm(share)
    (result**3).sum().backward()
    norm.eval()
    return result.detach(), share.grad, norm.running_mean, norm.running_var, norm(share).detach()


def test_sync_bn_on_a_cpu_is_batch_norm_of_the_whole_batch(four_ranks):
    """Normalize uneven shares far from zero, where a variance by squares would lose its digits."""
    values = 1000 + torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    whole, norm = values.double().clone().requires_grad_(), torch.nn.BatchNorm2d(3).double()
    result = norm(whole)
    (result**3).sum().backward()
    answers = four_ranks(normalize_share, values)
    found, slopes, _, _, evaluated = (
        torch.cat(part).double() for part in zip(*answers, strict=True)
    )
    torch.testing.assert_close(found, result.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(slopes, whole.grad, atol=5e-3, rtol=1e-3)
    norm.eval()
    for answer in answers:  # a unit or two in float32's last place
        torch.testing.assert_close(answer[2].double(), norm.running_mean, rtol=2.5e-7, atol=0)
        torch.testing.assert_close(answer[3].double(), norm.running_var, rtol=1e-6, atol=0)
        assert torch.equal(answer[2], answers[0][2])
        assert torch.equal(answer[3], answers[0][3])
    torch.testing.assert_close(evaluated, norm(whole).detach(), atol=1e-2, rtol=1e-4)
