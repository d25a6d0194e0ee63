"""Rates against formulas, LARS against the published update, presets against cited numbers."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.recipes import RECIPES
from schemas import UserError
from train.config import find_recipe_name
from train.methods import MoCoConfig, SimCLRConfig
from train.optim import OptimConfig, build_optimizer, compute_learning_rate
from train.presets import PRESETS, choose_defaults


def rates(config: OptimConfig, steps: int, epoch: int = 1) -> list[float]:
    return [
        compute_learning_rate(config, step, peak=0.4, total=steps, epoch=epoch)
        for step in range(steps)
    ]


def test_cosine_from_peak_to_zero():
    found = rates(OptimConfig(), 10)
    assert found[0] == 0.4
    assert found[5] == pytest.approx(0.2)
    assert found[9] == pytest.approx(0.2 * (1 + math.cos(0.9 * math.pi)))


def test_warmup_is_linear_and_meets_the_cosine():
    found = rates(OptimConfig(warmup_epochs=2), 12, epoch=2)
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert found[8] == pytest.approx(0.2)


def test_steps_drop_to_a_tenth_at_their_epochs():
    found = rates(OptimConfig(schedule="steps", milestones=(2, 3)), 8, epoch=2)
    assert found == pytest.approx([0.4] * 4 + [0.04] * 2 + [0.004] * 2)


def test_rate_grows_with_the_batch_unless_given():
    assert OptimConfig(base_lr=0.03).peak(128) == pytest.approx(0.015)  # the released command
    assert OptimConfig(base_lr=0.03, lr=0.5).peak(128) == 0.5


def test_sgd_leaves_frozen_parameters_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    config = OptimConfig(momentum=0.8, weight_decay=0.1)
    (group,) = build_optimizer(model, config).param_groups
    assert len(group["params"]) == 2
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.1)


@pytest.mark.parametrize(("clip", "decay"), [(False, 0.1), (True, 0.1), (True, 0.0)])
def test_lars_scales_layers_and_leaves_norms_and_biases(clip, decay):
    """Compare two steps with the update of You et al. (arXiv 1708.03888), in float64."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()
    config = OptimConfig(
        optimizer="lars", weight_decay=decay, trust_coefficient=0.02, trust_clip=clip
    )
    optimizer = build_optimizer(model, config)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in weights.items()}
    lr = 0.5
    for step in range(2):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, p in model.named_parameters():
            gradient = p.grad.clone()
            if p.ndim > 1:
                length, steep = weights[name].norm(), gradient.norm()
                factor = 0.02 * length / (steep + decay * length)
                if clip:
                    factor = min(factor / lr, torch.tensor(1.0))
                gradient = factor * (gradient + decay * weights[name])
            speed[name] = 0.9 * speed[name] + gradient
            weights[name] = weights[name] - lr * speed[name]
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-6, atol=1e-9)


def test_presets_hold_the_numbers_that_they_cite():
    moco, strong = PRESETS["moco"].config, PRESETS["moco-in100"].config
    assert moco.optim.peak(128) == pytest.approx(0.015)
    assert (moco.method.queue, moco.method.ema_momentum, moco.method.rho) == (65_536, 0.999, 2.0)
    assert strong.optim.peak(strong.batch_size) == pytest.approx(0.8)
    assert (strong.batch_size, strong.method.ema_momentum) == (512, 0.99)
    simclr = PRESETS["simclr"].config
    assert simclr.optim.peak(simclr.batch_size) == pytest.approx(0.3 * 4096 / 256)
    assert (simclr.optim.optimizer, simclr.method.temperature) == ("lars", 0.1)


def test_recipes_keep_their_name_whatever_branch_and_views():
    hp = RECIPES["hp"]
    assert find_recipe_name(replace(hp, branch="key", hard_negatives=0, hue=0.2)) == "hp"
    assert find_recipe_name(replace(hp, query_ratio=(0.1, 0.2))) == "custom"
    assert find_recipe_name(choose_defaults(preset=PRESETS["supervised"]).recipe) == "none"


def test_crops_are_resized_as_the_sources_of_a_preset_do():
    """google-research/simclr, solo-learn and ADIOS resize bicubically, torchvision bilinearly."""
    modes = {name: choose_defaults(preset=PRESETS[name]).recipe.interpolation for name in PRESETS}
    assert {name for name, mode in modes.items() if mode == "bicubic"} == {
        "simclr", "simclr-in100", "adios",
    }  # fmt: skip
    assert set(modes.values()) == {"bicubic", "bilinear"}


def test_masks_combine_with_the_views_of_a_preset():
    config = choose_defaults(method=SimCLRConfig, recipe=RECIPES["blur"])
    assert (config.recipe.fill, config.recipe.hue, config.recipe.crop_area[0]) == (
        "blur",
        0.2,
        0.08,
    )
    assert choose_defaults() == PRESETS["moco"].config
    assert choose_defaults(preset=PRESETS["simclr-in100"]).epochs == 400
    with pytest.raises(UserError, match="--preset is of method simclr, --method is moco"):
        choose_defaults(preset=PRESETS["simclr"], method=MoCoConfig)
