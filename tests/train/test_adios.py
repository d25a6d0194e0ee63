"""ADIOS: each step updates only its own network, against float64 loops; masks are a partition."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import train.trainer
from pipeline import RECIPES, Batch
from schemas import UserError
from tests.train import oracle
from tests.train.runs import config, metrics, stopped_after
from train.__main__ import parse_command_line
from train.config import TrainConfig, resolve_config
from train.distributed import rank, world_size
from train.methods import ADIOSConfig, Setup
from train.methods.adios import ADIOS, negative_entropy, sparsity_penalty
from train.methods.occlusion import OcclusionNet
from train.optim import OptimConfig
from train.training_step import TrainingStep, prepare_model_

CPU = torch.device("cpu")
SIDE = 32


def batch_of(size: int = 4, side: int = SIDE, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(size, 3, side, side, generator=generator) for _ in range(2))
    return Batch(query=query, key=key, hard_negative=None, label=torch.zeros(size).long())


def game(**options) -> ADIOS:
    torch.manual_seed(0)
    config = ADIOSConfig(queue=11, projection=5, hidden=None, **options)
    setup = Setup(encoder="tiny_norm", batch_size=4, crop_size=SIDE)
    return config.build(setup)


def step_of(method: ADIOS, **optim) -> TrainingStep:
    config = TrainConfig(
        data="", out="", batch_size=4, precision="fp32", optim=OptimConfig(lr=0.1, **optim)
    )
    return TrainingStep(prepare_model_(method, config, CPU), config, CPU)


@pytest.mark.parametrize(
    ("channels", "millions"), [(8, 0.24), (16, 0.51), (32, 1.17)]
)  # docs/method.md, ADIOS: counted from the released code
def test_occlusion_network_has_the_published_size(channels, millions):
    net = OcclusionNet(224, masks=4, channels=channels, norm="group")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_occlusion_network_without_a_norm_has_biases():
    """The released code has 136 parameters more with biases than without, one for each channel."""
    net = OcclusionNet(224, masks=4, channels=8, norm="none")
    assert sum(p.numel() for p in net.parameters()) == 240_404


@pytest.mark.parametrize(("side", "norm"), [(64, "group"), (96, "instance"), (160, "none")])
def test_masks_partition_the_image(side, norm):
    masks = OcclusionNet(side, masks=5, channels=8, norm=norm)(torch.randn(2, 3, side, side))
    assert masks.shape == (2, 5, side, side)
    assert (masks >= 0).all()
    torch.testing.assert_close(masks.sum(dim=1), torch.ones(2, side, side))


def test_crop_that_cannot_be_halved_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"--crop-size 100: adios halves it 4 times; .* 96"):
        OcclusionNet(100, masks=4, channels=8, norm="group")


@pytest.mark.parametrize("side", [32, 64, 96])
def test_sizes_of_cifar_10_and_stl_10_train(side):
    """The command line's recipe has no cells that must divide these sides."""
    argv = ["--data", "d", "--out", "o", "--method", "adios", "--crop-size", str(side)]
    settings = resolve_config(replace(parse_command_line(argv), batch_size=2), CPU)
    assert settings.recipe.crop_size == side
    setup = Setup(encoder="tiny_norm", batch_size=2, crop_size=side)
    method = ADIOSConfig(projection=5, hidden=None).build(setup)
    scalars = step_of(method)([batch_of(2, side)], 0.1)
    assert math.isfinite(scalars["loss"])
    assert math.isfinite(scalars["mask_loss"])


@pytest.mark.parametrize("channels", [4, 12])
def test_channels_that_cannot_be_grouped_are_refused(channels):
    with pytest.raises(UserError, match=rf"--channels {channels}: group norm needs a multiple of"):
        game(channels=channels)
    assert game(channels=channels, norm="instance")


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_key_is_queued_once_a_step(single, micro_batches):
    """Keys are remembered once, however many masks are applied in however many steps."""
    method = game(objective="moco", single=single)
    batches = [batch_of(seed=seed) for seed in range(micro_batches)]
    start, branch = method.inner.queue.clone(), copy.deepcopy(method.inner).train()
    expected = torch.cat([branch.momentum_project(batch.key) for batch in batches])
    step_of(method)(batches, 0.1)
    size = 4 * micro_batches
    assert method.inner.queue_next == size
    torch.testing.assert_close(method.inner.queue[:size], expected)
    assert torch.equal(method.inner.queue[size:], start[size:])


@pytest.mark.parametrize("objective", ["simclr", "moco"])
@pytest.mark.parametrize("single", [True, False])
def test_each_network_updates_only_its_own_weights_and_statistics(objective, single):
    method = game(objective=objective, single=single)
    step = step_of(method)
    seen = []

    def watch(scalars):
        seen.append({name: value.clone() for name, value in method.state_dict().items()})

    step([batch_of()], 0.1, watch)  # called before the update of each group
    start, between = seen
    end = method.state_dict()
    assert [group.prefix for group in step.groups] == ["", "mask_"]
    for name, value in start.items():
        if name.endswith("_extra_state") or "queue" in name:
            continue
        theirs = name.startswith("occlusion.")
        momentum = "momentum_" in name
        if theirs:
            assert torch.equal(value, between[name]), name
        else:  # the occlusion step changes neither weights nor statistics of the encoder
            assert torch.equal(between[name], end[name]), name
        if "weight" in name and not momentum and "norm" not in name:
            moved = end[name] if theirs else between[name]
            assert not torch.equal(value, moved), name


def test_occlusion_network_gains_against_a_frozen_encoder():
    """Its objective on the same images is higher after some of its own steps."""
    method = game(single=False, sparsity=0.1)
    method.eval()
    turn = method.optimization_groups()[1].module
    optimizer = torch.optim.SGD(turn.parameters(), lr=0.05)
    before = {name: value.clone() for name, value in method.inner.state_dict().items()}
    objective = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = turn(batch_of())["loss"]
        loss.backward()
        optimizer.step()
        objective.append(-loss.item())
    assert objective[-1] > objective[0] + 0.01
    for name, value in method.inner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in method.inner.parameters())


def test_penalty_and_entropy_equal_the_formulas():
    masks = torch.rand(3, 4, 8, 8, dtype=torch.float64).softmax(dim=1)
    penalty = entropy = 0.0
    for image in masks.numpy():
        shares = [mask.mean() for mask in image]
        penalty += sum(1 / (math.sin(math.pi * s) + 1e-10) for s in shares) / 3
        p = np.exp(shares) / np.exp(shares).sum()
        entropy += sum(
            x * math.log(x) for x in p
        )  # as the released code sums, over images and masks
    assert sparsity_penalty(masks).item() == pytest.approx(penalty, abs=1e-12)
    assert negative_entropy(masks).item() == pytest.approx(entropy, abs=1e-12)


def test_entropy_of_five_even_images_is_that_of_the_released_code():
    """The sum over images and masks is -5 ln 4; a mean over images would be -1.386."""
    assert negative_entropy(torch.full((5, 4, 8, 8), 0.25)).item() == pytest.approx(
        -6.931, abs=5e-4
    )


def penalty_of(share: float) -> float:
    """Compute the penalty in float32 for a mask with this share of a one-pixel image, unrounded."""
    return sparsity_penalty(torch.full((1, 1, 1, 1), share, dtype=torch.float32)).item()


@pytest.mark.parametrize("share", [0, 1e-6, 1e-4, 0.01, 0.25, 0.5, 0.75, 0.99, 0.9999, 1 - 1e-6, 1])
def test_float32_penalty_equals_the_float64_formula(share):
    """At a share of 1 the literal formula gives -1e7 in float32, because sin(pi) is below 0."""
    rounded = float(np.float32(share))
    exact = 1 / (math.sin(math.pi * rounded) + 1e-10)
    assert penalty_of(share) == pytest.approx(exact, rel=2e-6)  # the sine of pi is 1e-16 there
    nearly_all = float(
        np.float32(max(share, 1 - share))
    )  # float32 represents the remainder of 1 exactly
    assert penalty_of(nearly_all) == penalty_of(1 - nearly_all)


def test_rounding_above_a_full_share_gives_no_reward():
    assert penalty_of(1 + 2e-7) == pytest.approx(1e10)


def test_the_penalty_drives_masks_back_from_either_side():
    for share, direction in ((0.02, 1), (0.98, -1)):
        masks = torch.full((1, 1, 8, 8), share, requires_grad=True)
        sparsity_penalty(masks).backward()
        assert (-masks.grad * direction > 0).all()  # descent goes towards a half


@pytest.mark.parametrize("single", [True, False])
def test_losses_equal_the_formula_on_the_masked_views(single):
    """Check both steps from images on: the drawn mask sets pixels to 0, the key is unmasked."""
    method, batch = game(single=single, sparsity=0.3, entropy=0.2), batch_of()
    encoder_turn, occlusion_turn = (group.module for group in method.optimization_groups())
    state = {
        name.removeprefix("inner."): value.double().numpy()
        for name, value in method.state_dict().items()
        if name.startswith("inner.") and isinstance(value, torch.Tensor)
    }
    masks = method.occlusion(batch.query).detach().double()

    def expected():
        if single:
            generator = torch.Generator()
            generator.set_state(method.generator.get_state())
            chosen = torch.randint(4, (1, 4), generator=generator)[0]
            views = [batch.query * (1 - masks[torch.arange(4), chosen][:, None])]
        else:
            views = [batch.query * (1 - masks[:, n : n + 1]) for n in range(4)]
        key = embed(batch.key, state)
        return sum(
            oracle.simclr_loss(embed(view, state), key, [[]] * 4, rho=1, tau=0.2) for view in views
        )

    first = expected()
    assert encoder_turn(batch)["loss"].item() == pytest.approx(first, abs=1e-4)
    second = expected()
    penalty, entropy = sparsity_penalty(masks).item(), negative_entropy(masks).item()
    wanted = -(second - 0.3 * penalty + 0.2 * entropy)
    assert occlusion_turn(batch)["loss"].item() == pytest.approx(wanted, abs=1e-4)


def embed(images, w):
    """Compute `oracle.embed` for pictures of any side."""
    padded = np.pad(np.asarray(images, np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    side = images.shape[-1]
    maps = np.zeros((len(images), 6, side, side))
    for row in range(3):
        for column in range(3):
            part = padded[:, :, row : row + side, column : column + side]
            maps += np.einsum("nchw,fc->nfhw", part, w["encoder.conv.weight"][:, :, row, column])
    maps += w["encoder.conv.bias"][None, :, None, None]
    mean = maps.mean(axis=(0, 2, 3), keepdims=True)
    maps = (maps - mean) / np.sqrt(maps.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
    maps = maps * w["encoder.norm.weight"][None, :, None, None]
    pooled = np.maximum(maps + w["encoder.norm.bias"][None, :, None, None], 0).mean(axis=(2, 3))
    hidden = np.maximum(pooled @ w["head.0.weight"].T + w["head.0.bias"], 0)
    z = hidden @ w["head.2.weight"].T + w["head.2.bias"]
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_masks_are_drawn_evenly_and_the_state_resumes_the_draws():
    method, other = game(), game()
    counts = torch.zeros(4)
    masks = torch.eye(4).view(1, 4, 4, 1).expand(4, 4, 4, SIDE).repeat(1, 1, 8, 1)
    for _ in range(200):
        (view,) = method.apply_masks(batch_of(), masks)
        hidden = (view.query[:, 0] == 0).float().mean(dim=2)[:, :4]
        counts += hidden.sum(dim=0)
    assert counts.sum() == 800
    assert counts.min() > 150
    other.load_state_dict(method.state_dict())
    (one,), (two,) = method.apply_masks(batch_of(), masks), other.apply_masks(batch_of(), masks)
    assert torch.equal(one.query, two.query)


def shared_step(objective):
    """Make one step on this rank's part of a batch, with SyncBN."""
    method = game(objective=objective, entropy=0.3)
    config = TrainConfig(
        data="", out="", batch_size=4, precision="fp32", sync_bn=True, optim=OptimConfig(lr=0.1)
    )
    step = TrainingStep(prepare_model_(method, config, CPU), config, CPU)
    whole, share = batch_of(), 4 // world_size()
    rows = slice(rank() * share, (rank() + 1) * share)
    part = replace(whole, query=whole.query[rows], key=whole.key[rows], label=whole.label[rows])
    scalars = step([part], 0.1)
    state = {n: v for n, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    return {name: value.item() for name, value in scalars.items()}, state


def test_micro_batches_do_not_change_the_weight_of_the_entropy():
    """Without a contrast the gradient is that of the entropy, summed over all images."""
    gradients = []
    for micro_batches in (1, 2):
        method = game(entropy=0.3, sparsity=0.0).eval()
        turn, batch = method.optimization_groups()[1].module, batch_of()
        method.apply_masks = lambda batch, masks: iter([replace(batch, query=batch.key)])
        for rows in torch.arange(4).split(4 // micro_batches):
            micro_batch = replace(batch, query=batch.query[rows], key=batch.key[rows])
            (turn(micro_batch)["loss"] / micro_batches).backward()
        gradients.append(method.occlusion.head.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["simclr", "moco"])
def test_two_ranks_train_as_one_does(two_ranks, objective):
    expected, state = shared_step(objective)
    answers = two_ranks(shared_step, objective)
    for name, value in expected.items():
        found = np.mean([scalars[name] for scalars, _ in answers])
        if "accuracy" not in name:
            assert found == pytest.approx(value, abs=2e-4), name
    for _, theirs in answers:
        for name, value in state.items():
            if not name.endswith("_extra_state"):
                torch.testing.assert_close(theirs[name], value, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_resume_is_exact_with_both_optimizers(shards, tmp_path, monkeypatch):
    settings = config(
        shards, tmp_path / "whole", method=ADIOSConfig(hidden=16, projection=8), crop_size=56,
        recipe=RECIPES["none"], epochs=1, checkpoint_steps=2, log_steps=1,
    )  # fmt: skip
    train.trainer.train(settings)

    stopped = replace(settings, out=str(tmp_path / "stopped"))
    with stopped_after(3, monkeypatch):
        train.trainer.train(stopped)
    train.trainer.train(stopped)
    for row, again in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "stopped"), strict=True):
        assert [row[n] for n in ("loss", "mask_loss")] == [again[n] for n in ("loss", "mask_loss")]
