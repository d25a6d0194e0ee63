"""Presets: named sets of published hyperparameters, with their sources.

A preset provides the options that the command line does not set; `--method NAME` alone selects the
preset of that name. `views` changes fields of the recipe, so masks combine with any preset.
Learning rates are for a batch of 256 (`OptimConfig.base_lr`) and scale linearly with the batch.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.recipes import RECIPES, VIEW_FIELDS, Recipe
from schemas import UserError
from train.config import TrainConfig
from train.methods import (
    ADIOSConfig,
    MaskCoConfig,
    MethodConfig,
    MoCoConfig,
    SimCLRConfig,
    SupervisedConfig,
    get_method_name,
)
from train.optim import OptimConfig

# google-research/simclr, data_util.py: colors of strength 1.0, bicubic crops of at least 8 % of the
# image; the same in solo-learn. The kernel of its blur is a tenth of the side; ours ends at three
# sigma.
SIMCLR_VIEWS: dict[str, Any] = {
    "crop_area": (0.08, 1.0),
    "interpolation": "bicubic",
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
}
# as in torchvision's reference training: only crop and flip
SUPERVISED_VIEWS: dict[str, Any] = {
    "pair": False,
    "hard_negatives": 0,
    "crop_area": (0.08, 1.0),
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "soft_blur_probability": 0.0,
}


@dataclass(frozen=True)
class Preset:
    """Default options of a run, and the fields of the recipe that they change."""

    config: TrainConfig
    views: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    # The released command of the masked variant (its README): lr 0.015 at batch 128, which is
    # MoCo v2's 0.03 at 256; queue 65,536, m 0.999, tau 0.2, rho 2, 200 epochs.
    "moco": Preset(TrainConfig(method=MoCoConfig(), optim=OptimConfig(base_lr=0.03))),
    # A stronger baseline on ImageNet-100 with ResNet-50 (joshr17/IFM README; also NNS): lr 0.8 at
    # 512, m 0.99, queue 65,536. With patch negatives NNS reports 81.18 for this queue, and 81.49
    # for the `--moco-k 16384` of its README's command.
    "moco-in100": Preset(
        TrainConfig(
            method=MoCoConfig(ema_momentum=0.99), batch_size=512, optim=OptimConfig(base_lr=0.4)
        )
    ),
    # SimCLR v1 on ImageNet (google-research/simclr, README, run.py, model_util.py, objective.py):
    # batch 4096, LARS 0.3 at 256, weight decay 1e-4, 10 epochs of warm-up, tau 0.1, batch
    # statistics over all devices and both views, a head of three normalized layers, the loss summed
    # over both directions, residual blocks that start as identities; 100 to 1000 epochs there.
    "simclr": Preset(
        TrainConfig(
            method=SimCLRConfig(
                temperature=0.1,
                head_layers=3,
                head_norm=True,
                sum_directions=True,
                joint_views=True,
            ),
            zero_init_residual=True,
            sync_bn=True,
            batch_size=4096,
            epochs=200,
            optim=OptimConfig(
                optimizer="lars",
                base_lr=0.3,
                warmup_epochs=10,
                trust_coefficient=0.001,
                trust_clip=False,
            ),
        ),
        SIMCLR_VIEWS,
    ),
    # SimCLR on ImageNet-100 with ResNet-18 (solo-learn): LARS eta 0.02 with clipping, lr 0.3 at
    # 256, a head with 4096 hidden and 512 output units, tau 0.2, 400 epochs.
    "simclr-in100": Preset(
        TrainConfig(
            method=SimCLRConfig(temperature=0.2, hidden=4096, projection=512),
            sync_bn=True,
            epochs=400,
            optim=OptimConfig(optimizer="lars", base_lr=0.3, warmup_epochs=10),
        ),
        SIMCLR_VIEWS,
    ),
    # SimCLR + ADIOS-s on ImageNet-100 with ResNet-18 (YugeTen/adios, bash_files/training): LARS
    # with 0.1896 for the encoder and 0.4988 for the masks at its batch of 128, 400 epochs, 10 of
    # them warm-up. Its code does not scale rates with the batch, this trainer does; at 128 they
    # agree.
    "adios": Preset(
        TrainConfig(
            method=ADIOSConfig(),
            recipe=RECIPES["none"],
            sync_bn=True,
            batch_size=128,
            epochs=400,
            optim=OptimConfig(optimizer="lars", base_lr=2 * 0.1896, warmup_epochs=10),
        ),
        {
            "crop_area": (0.08, 1.0),
            "interpolation": "bicubic",
            "brightness": 0.7,
            "contrast": 0.6,
            "saturation": 0.8,
            "hue": 0.15,
        },
    ),
    # MaskCo (Zhao et al., ICCV 2021): its numbers were not available to us; these are MoCo v2's.
    "maskco": Preset(
        TrainConfig(
            method=MaskCoConfig(), recipe=RECIPES["maskco"], optim=OptimConfig(base_lr=0.03)
        )
    ),
    # The usual reference for a ResNet on ImageNet: 0.1 at 256, divided by 10 at epochs 30 and 60.
    # How the paper trained its supervised row is not known.
    "supervised": Preset(
        TrainConfig(
            method=SupervisedConfig(),
            recipe=RECIPES["none"],
            epochs=90,
            optim=OptimConfig(base_lr=0.1, schedule="steps", milestones=(30, 60)),
        ),
        SUPERVISED_VIEWS,
    ),
}


def choose_defaults(
    preset: Preset | None = None,
    method: type[MethodConfig] | None = None,
    recipe: Recipe | None = None,
    file: TrainConfig | None = None,
) -> TrainConfig:
    """Return the options that apply before the command line changes single ones.

    Args:
        file: options read from a file; they replace a preset. With another recipe, crops and
            colors remain those of the file.

    Raises:
        UserError: the preset, or the file, is for another method.
    """
    if file is not None:
        if preset is not None or method not in (None, type(file.method)):
            raise UserError("--config already names the method: leave --preset and --method out")
        if recipe is None:
            return file
        views = {name: getattr(file.recipe, name) for name in VIEW_FIELDS}
        if not file.recipe.pair:
            views["hard_negatives"] = 0
        return replace(file, recipe=replace(recipe, **views))
    if preset is None:
        preset = find_preset(method or MoCoConfig)
    elif method is not None and type(preset.config.method) is not method:
        raise UserError(
            f"--preset is of method {preset.config.method.name}, --method is {method.name}; "
            "a preset alone chooses its method"
        )
    config = preset.config
    return replace(config, recipe=replace(recipe or config.recipe, **preset.views))


def find_preset(method: type[MethodConfig]) -> Preset:
    """Return the preset of a method's name; a user's own method gets the defaults of `TrainConfig`.

    Raises:
        UserError: an option of the method has no default.
    """
    preset = PRESETS.get(method.name)
    if preset is not None and type(preset.config.method) is method:
        return preset
    try:
        return Preset(TrainConfig(method=method()))
    except TypeError as error:
        raise UserError(
            f"method {get_method_name(method)}: {error}; give each option a default"
        ) from error
