"""Named settings of whole trainings: published numbers, each with its source.

A preset gives the options that the command line does not; `--method NAME` alone takes the preset of
that name. `views` changes fields of the recipe, so that masks combine with any preset. Rates are
for a batch of 256 (`OptimConfig.base_lr`) and grow in proportion to it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.recipes import RECIPES, Recipe
from schemas import UserError
from train.config import TrainConfig
from train.methods import (
    ADIOSConfig,
    MaskCoConfig,
    MethodConfig,
    MoCoConfig,
    SimCLRConfig,
    SupervisedConfig,
    name_of,
)
from train.optim import OptimConfig

# google-research/simclr, data_util.py: colors of strength 1.0, bicubic crops from 8 % of the image
# on; solo-learn's are the same. Its blur has a kernel of a tenth of the side; ours is cut at three
# sigma.
SIMCLR_VIEWS: dict[str, Any] = {
    "crop_area": (0.08, 1.0),
    "interpolation": "bicubic",
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
}
# torchvision's and everyone's: crop and flip alone
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
    """Defaults of a training, and what they change of the recipe."""

    config: TrainConfig
    views: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    # The released command of the masked variant (its README): lr 0.015 at 128, as MoCo v2's 0.03 at
    # 256; queue 65,536, m 0.999, tau 0.2, rho 2, 200 epochs.
    "moco": Preset(TrainConfig(method=MoCoConfig(), optim=OptimConfig(base_lr=0.03))),
    # The stronger one on ImageNet-100 with ResNet-50 (joshr17/IFM README; also NNS): lr 0.8 at 512,
    # m 0.99, queue 65,536. With patch negatives NNS reports 81.18 with this queue; its README's
    # command has `--moco-k 16384`, with which it reports 81.49.
    "moco-in100": Preset(
        TrainConfig(
            method=MoCoConfig(ema_momentum=0.99), batch_size=512, optim=OptimConfig(base_lr=0.4)
        )
    ),
    # SimCLR v1 on ImageNet (google-research/simclr, README, run.py, model_util.py, objective.py):
    # batch 4096, LARS 0.3 at 256, weight decay 1e-4, 10 epochs of warm-up, tau 0.1, statistics over
    # all devices and both views, a head of three normalized layers, the sum of both directions,
    # residual blocks that start as identities; 100 to 1000 epochs there.
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
                optimizer="lars", base_lr=0.3, warmup_epochs=10, trust=0.001, trust_clip=False
            ),
        ),
        SIMCLR_VIEWS,
    ),
    # SimCLR on ImageNet-100 with ResNet-18 (solo-learn): LARS eta 0.02 with clipping, lr 0.3 at
    # 256, head 4096 wide, 512 out, tau 0.2, 400 epochs.
    "simclr-in100": Preset(
        TrainConfig(
            method=SimCLRConfig(temperature=0.2, hidden=4096, projection=512),
            sync_bn=True,
            epochs=400,
            optim=OptimConfig(optimizer="lars", base_lr=0.3, warmup_epochs=10),
        ),
        SIMCLR_VIEWS,
    ),
    # SimCLR + ADIOS-s on ImageNet-100 with ResNet-18 (YugeTen/adios, bash_files/training): LARS,
    # 0.1896 for the encoder and 0.4988 for the masks at its batch of 128, 400 epochs, 10 of
    # warm-up. Its code does not scale rates by the batch, this trainer does: at 128 they are equal.
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
    # MaskCo (Zhao et al., ICCV 2021) published no numbers that we could read: MoCo v2's.
    "maskco": Preset(
        TrainConfig(
            method=MaskCoConfig(), recipe=RECIPES["maskco"], optim=OptimConfig(base_lr=0.03)
        )
    ),
    # The usual reference for a ResNet on ImageNet: 0.1 at 256, a tenth from epochs 30 and 60 on. Of
    # the paper's supervised row nothing is known.
    "supervised": Preset(
        TrainConfig(
            method=SupervisedConfig(),
            recipe=RECIPES["none"],
            epochs=90,
            optim=OptimConfig(base_lr=0.1, schedule="steps", drop_epochs=(30, 60)),
        ),
        SUPERVISED_VIEWS,
    ),
}


def starting_point(
    preset: Preset | None = None,
    method: type[MethodConfig] | None = None,
    recipe: Recipe | None = None,
    file: TrainConfig | None = None,
) -> TrainConfig:
    """The options before the command line changes single ones.

    Args:
        file: options read from a file; they stand in place of a preset.

    Raises:
        UserError: the preset, or the file, is of another method.
    """
    if file is not None:
        if preset is not None or method not in (None, type(file.method)):
            raise UserError("--config names the method already: leave --preset and --method out")
        return file if recipe is None else replace(file, recipe=recipe)
    if preset is None:
        preset = preset_of(method or MoCoConfig)
    elif method is not None and type(preset.config.method) is not method:
        raise UserError(
            f"--preset is of method {preset.config.method.name}, --method is {method.name}; "
            "a preset alone chooses its method"
        )
    config = preset.config
    return replace(config, recipe=replace(recipe or config.recipe, **preset.views))


def preset_of(method: type[MethodConfig]) -> Preset:
    """The preset of a method's name; a method from elsewhere has MoCo's loop and its own options.

    Raises:
        UserError: one of its options has no default.
    """
    known = PRESETS.get(method.name)
    if known is not None and type(known.config.method) is method:
        return known
    try:
        return Preset(TrainConfig(method=method()))
    except TypeError as error:
        raise UserError(f"method {name_of(method)}: {error}; give each option a default") from error
