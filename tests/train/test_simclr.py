"""NT-Xent with hard negatives against the formula, one number at a time."""

import itertools

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from schemas import UserError
from tests.train import oracle
from tests.train.ranks import random_batch
from train.encoders import build_encoder, build_untrained_encoder, zero_residual_gammas_
from train.methods import Setup, SimCLR, SimCLRConfig
from train.methods.method import build_projector
from train.methods.simclr import nt_xent
from train.presets import PRESETS

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
def test_a_step_equals_the_formula_on_the_embeddings(hard_negatives):
    """Each anchor uses the hard negatives of its own image: row j * N + i is the j-th of i."""
    method, batch = tiny(), random_batch(4, hard_negatives)
    with torch.no_grad():
        q, k = (method.project(x).double().tolist() for x in (batch.query, batch.key))
        views = [] if batch.hard_negative is None else batch.hard_negative
        embedded = [method.project(view[None])[0].double().tolist() for view in views]
        hard = [[embedded[j * 4 + i] for j in range(hard_negatives)] for i in range(4)]
    assert method(batch)["loss"].item() == pytest.approx(reference_loss(q, k, hard), abs=1e-5)


@pytest.mark.parametrize("flows", [True, False])
def test_the_gradient_flows_through_hard_negatives_when_asked(flows):
    """Without the gradient, hard negatives are constants: the gradient is that of frozen copies."""
    batch = random_batch(4, 1)
    method = tiny(hard_gradient=flows)
    method(batch)["loss"].backward()
    other = tiny()
    frozen = tiny().requires_grad_(False)
    other.project_hard_negatives = frozen.project_hard_negatives
    other(batch)["loss"].backward()
    same = torch.allclose(method.encoder.conv.weight.grad, other.encoder.conv.weight.grad)
    assert same is not flows


def normalized(x, weight, offset):
    """Normalize (N, D) rows over the batch in float64."""
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * weight + offset


def test_the_released_head_is_three_normalized_layers():
    """As in google-research/simclr, model_util.py: no bias before a norm, no offset in the last."""
    torch.manual_seed(0)
    head = build_projector(2048, None, 128, layers=3, norm=True)
    trainable = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert trainable == 2 * 2048 * 2048 + 2048 * 128 + 2 * (2048 + 2048) + 128
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.01)

    head = build_projector(6, 5, 4, layers=3, norm=True)
    with torch.no_grad():
        for p in head.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape))
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    x = torch.randn(8, 6)
    expected = x.double().numpy()
    for layer in (0, 3, 6):
        expected = expected @ w[f"{layer}.weight"].T
        expected = normalized(expected, w[f"{layer + 1}.weight"], w[f"{layer + 1}.bias"])
        expected = np.maximum(expected, 0) if layer < 6 else expected
    np.testing.assert_allclose(head(x).detach().numpy(), expected, atol=1e-4)
    assert not w["7.bias"].any()
    assert not head[7].bias.requires_grad


def test_the_head_of_the_paper_is_unchanged():
    """Two layers have the names in checkpoints; one layer is a linear head."""
    assert list(build_projector(6, None, 4).state_dict()) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    assert list(build_projector(6, None, 4, layers=1).state_dict()) == ["0.weight", "0.bias"]
    with pytest.raises(UserError, match="--head-layers 0: must be at least 1"):
        build_projector(6, None, 4, layers=0)


def test_summed_directions_are_the_sum_of_both_means():
    """As in objective.py: loss_a + loss_b, each a mean over its N anchors."""
    summed, averaged, batch = tiny(sum_directions=True), tiny(), random_batch(4, 0)
    with torch.no_grad():
        q, k = (averaged.project(x).double().numpy() for x in (batch.query, batch.key))
    z = np.concatenate([q, k])
    total = 0.0
    for view in (0, 1):
        for i in range(4):
            anchor, positive = 4 * view + i, 4 * (1 - view) + i
            others = [z[anchor] @ z[j] / TAU for j in range(8) if j != anchor]
            share = np.exp(z[anchor] @ z[positive] / TAU) / np.exp(others).sum()
            total -= np.log(share) / 4
    assert summed(batch)["loss"].item() == pytest.approx(total, abs=1e-5)
    assert averaged(batch)["loss"].item() == pytest.approx(total / 2, abs=1e-5)


@pytest.mark.parametrize("joint", [True, False])
def test_joint_views_share_batch_statistics(joint):
    torch.manual_seed(0)
    config = SimCLRConfig(projection=5, joint_views=joint)
    method = SimCLR(config, Setup(encoder="tiny_norm", batch_size=4)).train()
    weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
    batch = random_batch(4, 0)
    if joint:
        expected = oracle.embed(torch.cat([batch.query, batch.key]), weights)
    else:
        expected = np.concatenate([oracle.embed(x, weights) for x in (batch.query, batch.key)])
    embedded = torch.cat(method.project_pair(batch.query, batch.key)).detach().numpy()
    np.testing.assert_allclose(embedded, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_whose_last_gamma_is_0_start_as_identities(name):
    """The reference is torchvision's own `zero_init_residual`."""
    torch.manual_seed(0)
    encoder, _ = build_encoder(name)
    zero_residual_gammas_(encoder, name)
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, zero_init_residual=True)
    reference.fc = nn.Identity()
    for key, value in reference.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], value), key
    x = torch.rand(2, encoder.layer1[1].conv1.in_channels, 8, 8)  # not negative: ReLU keeps it
    assert torch.equal(encoder.layer1[1](x), x)
    with pytest.raises(UserError, match="--zero-init-residual: tiny has no residual blocks"):
        zero_residual_gammas_(build_encoder("tiny")[0], "tiny")
    start = build_untrained_encoder({"encoder": name, "zero_init_residual": "True"}, 0)
    assert torch.equal(start.layer1[1](x), x)


def test_preset_simclr_is_the_released_code():
    config = PRESETS["simclr"].config
    assert config.zero_init_residual
    assert config.sync_bn
    method = config.method
    assert (method.head_layers, method.head_norm, method.temperature) == (3, True, 0.1)
    assert method.sum_directions
    assert method.joint_views


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_reported_similarities_are_means_over_all_pairs(hard_negatives):
    method, batch = tiny(), random_batch(4, hard_negatives)
    batch.key[0] = batch.query[0]  # the positive of these two anchors wins
    with torch.no_grad():
        q, k = (method.project(x).double().tolist() for x in (batch.query, batch.key))
        views = [] if batch.hard_negative is None else batch.hard_negative
        hard = [method.project(view[None])[0].double().tolist() for view in views]
    scalars = {name: value.item() for name, value in method(batch).items()}
    z, wins, others = [*q, *k], 0, []
    for i in range(8):
        positive = (i + 4) % 8
        rest = [oracle.dot(z[i], z[j]) for j in range(8) if j not in (i, positive)]
        others += rest
        wins += oracle.dot(z[i], z[positive]) > max(rest)
    assert 0 < wins < 8
    assert scalars["negatives_accuracy"] == wins / 8
    own = [oracle.dot(q[i], k[i]) for i in range(4)]
    assert scalars["key_similarity"] == pytest.approx(np.mean(own), abs=1e-6)
    assert scalars["negatives_similarity"] == pytest.approx(np.mean(others), abs=1e-6)
    assert method.warnings(scalars | {"negatives_similarity": 0.98}) == []
    assert len(method.warnings(scalars | {"negatives_similarity": 0.995})) == 1
    if hard_negatives:
        to_hard = [oracle.dot(q[i], hard[j * 4 + i]) for i in range(4) for j in range(2)]
        assert scalars["hard_similarity"] == pytest.approx(np.mean(to_hard), abs=1e-6)
    else:
        assert "hard_similarity" not in scalars
