"""NT-Xent with hard negatives against the formula, one number at a time."""

import itertools

import numpy as np
import pytest
import torch

from tests.train import oracle
from tests.train.ranks import random_batch
from train.methods import Setup, SimCLR, SimCLRConfig
from train.methods.simclr import nt_xent

RHO, TAU = 1.7, 0.3
FIELDS = [
    {"hard_for_keys": keys, "hard_of_others": others}
    for keys, others in itertools.product((False, True), repeat=2)
]


def reference_loss(q, k, hard, **fields):
    return oracle.simclr_loss(q, k, hard, rho=RHO, tau=TAU, **fields)


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
    return SimCLR(config, Setup(encoder="tiny", batch_size=4)).train()


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
