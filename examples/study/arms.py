"""Define the arms of the study, and the settings that they share at each scale."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.recipes import RECIPES, Recipe
from train.config import TrainConfig
from train.methods import (
    ADIOSConfig,
    MaskCoConfig,
    MethodConfig,
    MoCoConfig,
    SimCLRConfig,
    SupervisedConfig,
)
from train.methods.method import compute_balanced_rho
from train.optim import OptimConfig
from train.presets import PRESETS, SUPERVISED_VIEWS

FILLS = ("hp", "blur", "mean")
ABLATION = "mean"
"""Fill of the arms that vary the branch and rho (our choice)."""

ScaleName = Literal["cpu", "gpu", "gpu-small"]


@dataclass(frozen=True, kw_only=True)
class Tier:
    """The arms to train, and for how long.

    Attributes:
        epochs: number of passes over the images.
        seeds: random seeds; each arm is trained once with each.
        arms: names of arms.
    """

    epochs: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Settings that every arm of a study shares.

    Attributes:
        config: settings of the training, with MoCo v2's own numbers; an arm changes method and
            recipe.
        supervised: optimizer of the supervised arm.
        probe_epochs: epochs of each linear probe.
        tiers: the tiers by their number, 1 or 2.
    """

    config: TrainConfig
    supervised: OptimConfig
    probe_epochs: int
    tiers: dict[int, Tier]


@dataclass(frozen=True)
class Arm:
    """Settings that distinguish an arm: its recipe, its method, and its optimizer if it differs."""

    recipe: Recipe
    method: MethodConfig
    optim: OptimConfig | None = None


FIRST_TIER = (
    "plain",
    "high-pass",
    *(f"{fill}-random" for fill in FILLS),
    *(f"{fill}-guided" for fill in FILLS),
    *(f"{fill}-hard" for fill in FILLS),
    f"{ABLATION}-key",
    f"{ABLATION}-both",
    *(f"{ABLATION}-hard-rho-{rho}" for rho in ("balanced", "1", "3")),
    "supervised",
)
SECOND_TIER = (
    "plain",
    *(f"{fill}-guided" for fill in FILLS),
    *(f"{fill}-hard" for fill in FILLS),
    f"{ABLATION}-random",
)


WARMUP_EPOCHS = 2
"""Warm-up of the arms that have one (our choice): 92 steps on imagenette160. MoCo's queue starts
with random vectors, which the keys of 32 steps replace; without a warm-up the embeddings of all
images become the same before that (docs/results.md)."""
WITH_WARMUP = tuple(f"{name}-warmup" for name in SECOND_TIER)


def build_tiers(first: int, second: int, arms: tuple[str, ...] = SECOND_TIER) -> dict[int, Tier]:
    """Return both tiers for these numbers of epochs, and the second tier's arms."""
    return {
        1: Tier(epochs=first, seeds=(0,), arms=FIRST_TIER),
        2: Tier(epochs=second, seeds=(0, 1, 2), arms=arms),
    }


SCALES: dict[ScaleName, Scale] = {
    # Imagenette at 160 pixels on a CPU (all numbers are our choice): a cell of a 56 pixel view has
    # 8 pixels. fp32 on every CPU: runs of one table may come from different machines.
    "cpu": Scale(
        config=TrainConfig(
            method=MoCoConfig(queue=4096, ema_momentum=0.99),
            encoder="resnet18",
            crop_size=56,
            batch_size=128,
            precision="fp32",
            optim=OptimConfig(lr=0.06),
        ),
        supervised=OptimConfig(base_lr=0.1),
        probe_epochs=30,
        tiers=build_tiers(24, 96, WITH_WARMUP),
    ),
    # The paper's first table: ResNet-50 on ImageNet-100 with the preset's published numbers.
    "gpu": Scale(
        config=replace(PRESETS["moco-in100"].config, encoder="resnet50", epochs=200),
        # the preset drops the rate after each third of its 90 epochs
        supervised=replace(PRESETS["supervised"].config.optim, milestones=(67, 133)),
        probe_epochs=100,
        tiers=build_tiers(200, 200),
    ),
    # Imagenette at its full size on one GPU (all numbers are our choice).
    "gpu-small": Scale(
        config=TrainConfig(
            method=MoCoConfig(queue=4096, ema_momentum=0.99),
            encoder="resnet18",
            crop_size=112,
            batch_size=256,
            optim=OptimConfig(base_lr=0.06),
        ),
        supervised=OptimConfig(base_lr=0.1),
        probe_epochs=100,
        tiers=build_tiers(100, 400, WITH_WARMUP),
    ),
}


def build_arms(scale: Scale) -> dict[str, Arm]:
    """Return every arm by its name. Arms that are in no tier are trained only on request."""
    moco = scale.config.method
    assert isinstance(moco, MoCoConfig)
    memory: dict[str, Any] = {"queue": moco.queue, "ema_momentum": moco.ema_momentum}
    plain = RECIPES["none"]
    arms = {
        "plain": Arm(plain, moco),
        "high-pass": Arm(replace(plain, high_pass=True), moco),
        "mscn": Arm(RECIPES["mscn"], moco),
        "maskco": Arm(RECIPES["maskco"], MaskCoConfig(**memory)),
        "adios": Arm(plain, ADIOSConfig(objective="moco", hidden=None, **memory)),
        "supervised": Arm(
            replace(plain, **SUPERVISED_VIEWS), SupervisedConfig(), optim=scale.supervised
        ),
        "simclr-plain": Arm(plain, SimCLRConfig()),
        "simclr-mscn": Arm(RECIPES["mscn"], SimCLRConfig()),
        "simclr-adios": Arm(plain, ADIOSConfig(hidden=None)),
    }
    for fill in FILLS:
        hard = RECIPES[fill]
        guided = replace(hard, hard_negatives=0)
        arms[f"{fill}-random"] = Arm(replace(guided, query_mask="random"), moco)
        arms[f"{fill}-guided"] = Arm(guided, moco)
        arms[f"{fill}-hard"] = Arm(hard, moco)
        arms[f"{fill}-key"] = Arm(replace(guided, branch="key"), moco)
        arms[f"{fill}-both"] = Arm(replace(guided, branch="both"), moco)
        arms[f"simclr-{fill}"] = Arm(hard, SimCLRConfig())
        for name, rho in list_rhos(moco).items():
            arms[f"{fill}-hard-rho-{name}"] = Arm(hard, replace(moco, rho=rho))
    optim = replace(scale.config.optim, warmup_epochs=WARMUP_EPOCHS)
    for name, warm in zip(SECOND_TIER, WITH_WARMUP, strict=True):
        arms[warm] = replace(arms[name], optim=optim)
    return arms


def list_rhos(moco: MoCoConfig) -> dict[str, float]:
    """Return the values of rho besides the published 2; `balanced` is tau ln(queue / 3)."""
    return {"balanced": compute_balanced_rho(moco.temperature, moco.queue), "1": 1.0, "3": 3.0}


def build_config(scale: Scale, arm: Arm, **run: Any) -> TrainConfig:
    """Return the training of an arm; `run` gives data, out, epochs, seed and device."""
    return replace(
        scale.config,
        method=arm.method,
        recipe=arm.recipe,
        optim=arm.optim or scale.config.optim,
        keep_checkpoints=1,
        **run,
    )


DESCRIPTIONS: dict[str, Callable[[str], str]] = {
    "random": lambda fill: f"random masks, {fill}",
    "guided": lambda fill: f"saliency-guided masks, {fill}",
    "hard": lambda fill: f"saliency-guided masks, {fill}, hard negatives",
    "key": lambda fill: f"saliency-guided masks on the key, {fill}",
    "both": lambda fill: f"saliency-guided masks on query and key, {fill}",
}


def describe_arm(name: str) -> str:
    """Return the description of an arm for the table."""
    if name in WITH_WARMUP:
        return f"{describe_arm(name.removesuffix('-warmup'))}, warm-up"
    fixed = {
        "plain": "plain MoCo v2",
        "high-pass": "high-pass filter only, no masks",
        "supervised": "supervised",
    }
    fill, _, kind = name.partition("-")
    kind, _, rho = kind.partition("-rho-")
    if name in fixed or fill not in FILLS or kind not in DESCRIPTIONS:
        return fixed.get(name, name)
    return DESCRIPTIONS[kind](fill) + (f", rho {rho}" if rho else "")
