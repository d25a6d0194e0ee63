"""The options of one training. The command line, config.yaml and checkpoints are views of this."""

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import tyro

from pipeline.recipes import RECIPES, Recipe
from schemas import UserError
from train.distributed import world_size
from train.methods import MoCoConfig, SimCLRConfig, method_of
from train.optim import LR_PER_BATCH

# These may differ between a checkpoint and the run that goes on from it: they change where a run
# lies and what it tells, not what it computes.
FREE = {
    "data", "out", "device", "resume", "checkpoint_steps", "keep_checkpoints", "log_steps",
    "cache", "cache_gb",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Pretrain an encoder on masked views of a dataset of shards.

    Under torchrun each process is one rank of the same training; without it there is one process.
    """

    data: str = tyro.MISSING
    """The dataset: a folder that `precompute` wrote, or its URL."""
    out: str = tyro.MISSING
    """The run's folder; on every machine the same one."""

    method: Annotated[MoCoConfig | SimCLRConfig, tyro.conf.arg(name="")] = field(
        default_factory=MoCoConfig
    )
    """The method and its own options."""
    recipe: Recipe = field(default_factory=lambda: RECIPES["hp"])
    """How views are cut and masked."""
    encoder: str = "resnet50"
    """A torchvision ResNet: resnet18 ... resnet152, resnext*, wide_resnet*. Random weights."""
    crop_size: int | None = None
    """Side of a view in pixels; the recipe's own when not given."""

    batch_size: int = 256
    """Images a step, of all processes together."""
    epochs: int = 200
    """Times the dataset is seen."""
    lr: float | None = None
    """Highest learning rate; 0.03 x batch size / 256 when not given."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all parameters."""
    warmup_epochs: int = 0
    """Epochs in which the rate rises linearly from 0."""
    seed: int = 0
    """Of weights, queue, order, crops and masks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the networks; the loss is always fp32. auto: bf16 where the device computes in it."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last checkpoint in the run's folder. never: refuse if there is one."""
    checkpoint_steps: int | None = None
    """Save every so many steps, besides at the end of each epoch."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay."""
    log_steps: int = 10
    """Steps between two log lines; only then does the host wait for the device."""
    cache: str | None = None
    """A local folder that remote shards are copied to first; s3:// and gs:// need none."""
    cache_gb: float = 500.0
    """What all copies there may take, in GB of 10^9 bytes."""

    @property
    def peak_lr(self) -> float:
        """`lr`, or what the linear rule gives for this batch."""
        return LR_PER_BATCH * self.batch_size if self.lr is None else self.lr


def resolved(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The same options with every `auto` and `None` that changes numbers decided.

    Raises:
        UserError: options that make no sense, alone or together.
    """
    for name in ("batch_size", "epochs", "keep_checkpoints", "log_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{option(name)} {getattr(config, name)}: must be at least 1")
    if config.batch_size % world_size():
        raise UserError(
            f"--batch-size {config.batch_size}: does not divide among {world_size()} processes; "
            f"the nearest that does is {nearest_multiple(config.batch_size, world_size())}"
        )
    if config.batch_size == world_size():
        raise UserError(
            f"--batch-size {config.batch_size}: one image a process; batch normalisation needs two"
        )
    if not 0 <= config.warmup_epochs < config.epochs:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs}: must be below --epochs {config.epochs}"
        )
    if config.checkpoint_steps is not None and config.checkpoint_steps < 1:
        raise UserError(f"--checkpoint-steps {config.checkpoint_steps}: must be at least 1")
    crop_size = config.crop_size or config.recipe.crop_size
    return replace(
        config,
        crop_size=crop_size,
        recipe=replace(config.recipe, crop_size=crop_size),
        lr=config.peak_lr,
        precision=pick_precision(config.precision, device),
    )


def pick_precision(name: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Decide `auto`: bf16 where the device has instructions for it, else fp32.

    On two cores with AVX512-BF16, a step of ResNet-18 on 112-pixel crops (one forward with
    gradient, two without) took half the time in bf16 channels_last that it took in fp32.
    """
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which networks run at this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def settings_of(config: TrainConfig, dataset_digest: str) -> dict[str, Any]:
    """All that a checkpoint and the run going on from it must have in common, flat: name -> value.

    `data` is the digest of what the dataset holds, so a dataset may move.
    """
    nested = {name: value for name, value in asdict(config).items() if name not in FREE}
    settings = {"data": dataset_digest, "method": method_of(config.method).name}
    for name, value in nested.items():
        if isinstance(value, dict):
            settings |= {f"{name}.{key}": plain(inner) for key, inner in value.items()}
        else:
            settings[name] = plain(value)
    return settings


def recipe_name(recipe: Recipe) -> str:
    """The name of a recipe at any crop size; `custom` once another of its values is changed."""
    for name, known in RECIPES.items():
        if replace(known, crop_size=recipe.crop_size) == recipe:
            return name
    return "custom"


def plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and a restored checkpoint show and compare them alike."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
