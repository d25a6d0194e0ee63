"""NT-Xent with hard negatives against the formula, one number at a time, on one rank and on two."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.train.ranks import Ranks, random_batch
from train.loop import parallel
from train.methods import SimCLR, SimCLRConfig
from train.methods.simclr import nt_xent

RHO, TAU = 1.7, 0.3
FIELDS = [
    {"hard_for_keys": keys, "hard_of_others": others}
    for keys, others in itertools.product((False, True), repeat=2)
]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def reference_loss(q, k, hard, *, hard_for_keys=False, hard_of_others=False):
    """Lists of vectors; hard[i] are those of image i."""
    m = len(q)
    z = [*q, *k]
    total = 0.0
    for i in range(2 * m):
        positive = i + m if i < m else i - m
        denominator = sum(math.exp(dot(z[i], z[j]) / TAU) for j in range(2 * m) if j != i)
        if i < m or hard_for_keys:
            for owner in range(m):
                if owner == i % m or hard_of_others:
                    denominator += sum(math.exp(RHO * dot(z[i], h) / TAU) for h in hard[owner])
        total -= math.log(math.exp(dot(z[i], z[positive]) / TAU) / denominator)
    return total / (2 * m)


def unit(generator, *shape):
    x = generator.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
@pytest.mark.parametrize("fields", FIELDS)
def test_loss_and_gradients_equal_the_formula(hard_negatives, fields):
    generator = np.random.default_rng(hard_negatives)
    arrays = [unit(generator, 4, 6), unit(generator, 4, 6), unit(generator, 4, hard_negatives, 6)]
    q, k, hard = (torch.tensor(array, requires_grad=True) for array in arrays)
    loss, _ = nt_xent(torch.stack([q, k]), hard, 0, rho=RHO, temperature=TAU, **fields)
    assert loss.item() == pytest.approx(reference_loss(*arrays, **fields), abs=1e-12)
    loss.backward()
    for which, tensor in enumerate((q, k, hard)):
        for index in np.ndindex(*tensor.shape):
            rise = []
            for step in (1e-6, -1e-6):
                moved = [array.copy() for array in arrays]
                moved[which][index] += step
                rise.append(reference_loss(*moved, **fields))
            assert tensor.grad[index].item() == pytest.approx((rise[0] - rise[1]) / 2e-6, abs=1e-8)


def tiny(**options) -> SimCLR:
    torch.manual_seed(0)
    config = SimCLRConfig(projection=5, rho=RHO, temperature=TAU, **options)
    return SimCLR("tiny", config, batch_size=4, seed=0).train()


@pytest.mark.parametrize("hard_negatives", [0, 1, 3])
def test_a_step_is_the_formula_on_the_embeddings(hard_negatives):
    """Each anchor meets the hard negatives of its own image: row j * N + i is the j-th of i."""
    method, batch = tiny(), random_batch(4, hard_negatives)
    with torch.no_grad():
        q, k = (method.project(x).double().tolist() for x in (batch.query, batch.key))
        views = [] if batch.hard_negative is None else batch.hard_negative
        embedded = [method.project(view[None])[0].double().tolist() for view in views]
        hard = [[embedded[j * 4 + i] for j in range(hard_negatives)] for i in range(4)]
    assert method(batch)["loss"].item() == pytest.approx(reference_loss(q, k, hard), abs=1e-5)


@pytest.mark.parametrize("flows", [True, False])
def test_the_gradient_flows_through_hard_negatives_when_asked(flows):
    """Without it, the hard negatives are numbers: the gradient is that of frozen copies."""
    batch = random_batch(4, 1)
    method = tiny(hard_gradient=flows)
    method(batch)["loss"].backward()
    other = tiny()
    frozen = tiny().requires_grad_(False)
    other.hard_negatives = frozen.hard_negatives
    other(batch)["loss"].backward()
    same = torch.allclose(method.encoder.conv.weight.grad, other.encoder.conv.weight.grad)
    assert same is not flows


def gradients(rank_and_size, options):
    """On a rank: the gradients of its part of one batch, averaged as DDP does."""
    rank, size = rank_and_size
    method = tiny(**options)
    whole = random_batch(4, 2)
    part = slice(rank * 4 // size, (rank + 1) * 4 // size)
    hard = torch.cat([view[part] for view in whole.hard_negative.split(4)])
    batch = SimpleNamespace(query=whole.query[part], key=whole.key[part], hard_negative=hard)
    model = parallel(method)  # kept: DDP's hooks go with it
    result = model(batch)
    result["loss"].backward()
    grads = {name: p.grad.clone() for name, p in method.named_parameters()}
    return result["loss"].item(), grads


def on_rank(options):
    import torch.distributed as dist

    return gradients((dist.get_rank(), dist.get_world_size()), options)


@pytest.mark.parametrize("options", [{}, {"hard_for_keys": True}, {"hard_gradient": False}])
def test_two_ranks_compute_the_gradients_of_one(two_ranks: Ranks, options):
    """Negatives come from all ranks, and gradients flow back to the rank that they came from."""
    loss, expected = gradients((0, 1), options)
    answers = two_ranks(on_rank, options)
    assert np.mean([loss for loss, _ in answers]) == pytest.approx(loss, abs=1e-6)
    for _, found in answers:
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-6), name
