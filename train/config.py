"""The options of one training. The command line, config.yaml and checkpoints are views of this."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pipeline import Cache
from pipeline.order import SHUFFLE_SHARDS
from pipeline.recipes import RECIPES, VIEW_FIELDS, Recipe
from schemas import UserError
from schemas.settings import defaults_of, equal, flatten
from train.distributed import world_size
from train.encoders import Stem
from train.methods import MethodConfig, MoCoConfig
from train.optim import OptimConfig

# These may differ between a checkpoint and the run that goes on from it: they change where a run
# lies and what it tells, not what it computes.
FREE = {
    "data", "out", "device", "resume", "checkpoint_steps", "keep_checkpoints", "log_steps",
    "cache", "cache_gb", "knn", "wandb", "rank_timeout", "method.path",
}  # fmt: skip


POSITIVE = ("shuffle_shards", "streams",
    "batch_size", "accumulate", "epochs", "keep_checkpoints", "log_steps", "checkpoint_steps",
    "rank_timeout", "synthetic", "shuffle_shards", "streams",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """kNN accuracy of the encoder while it trains; none where no data is given."""

    data: str | None = None
    """Labelled shards whose images are the neighbours."""
    test_data: str | None = None
    """Labelled shards to classify; without it `data` itself, leaving each image itself out."""
    epochs: int = 5
    """Epochs from one evaluation to the next; the last epoch is always evaluated."""
    neighbours: tuple[int, ...] = (20, 200)
    """Numbers of neighbours that vote, one accuracy each."""
    batch_size: int = 64
    """Images at a time on each process; changes no result."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Pretrain an encoder on masked views of a dataset of shards.

    Under torchrun each process is one rank of the same training; without it there is one process.
    """

    data: str = tyro.MISSING
    """The dataset: a folder that `precompute` wrote, or its URL."""
    out: str = tyro.MISSING
    """The run's folder; on every machine the same one."""

    method: Annotated[MethodConfig, tyro.conf.arg(name="")] = field(default_factory=MoCoConfig)
    """The method and its own options."""
    recipe: Recipe = field(default_factory=lambda: RECIPES["hp"])
    """How views are cut and masked."""
    encoder: str = "resnet50"
    """A torchvision ResNet (resnet18 ... resnet152, resnext*, wide_resnet*) or a ConvNet of timm
    (timm:convnext_tiny). Random weights."""
    stem: Stem = "imagenet"
    """small: a 3 x 3 first convolution of stride 1, no max-pool; for crops of 32 to 64 pixels."""
    zero_init_residual: bool = False
    """Start each residual block as an identity: the last norm's weight in it is 0."""
    sync_bn: bool = False
    """Batch normalisation over the images of all processes; MoCo then does not shuffle them."""
    crop_size: int | None = None
    """Side of a view in pixels; the recipe's own when not given."""

    batch_size: int = 256
    """Images a step, of all processes together."""
    accumulate: int = 1
    """Parts in which a process works through its images of a step, to save memory."""
    epochs: int = 200
    """Times the dataset is seen."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    seed: int = 0
    """Of weights, queue, order, crops and masks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the networks; the loss is always fp32. auto: bf16 where the device computes in it."""
    compile: bool = False
    """torch.compile the encoders. The first steps then take minutes."""
    synthetic: int | None = None
    """Pretend that the dataset has this many images and repeat one made-up batch that is on the
    device already: the rate of the step itself. Reads no data."""

    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the last checkpoint in the run's folder. never: refuse if there is one."""
    checkpoint_steps: int | None = None
    """Save every so many steps, besides at the end of each epoch."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints stay."""
    log_steps: int = 10
    """Steps between two log lines; only then does the host wait for the device."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Accuracy of the encoder's nearest neighbours, every so many epochs."""
    wandb: str | None = None
    """Log to this Weights & Biases project too; `wandb` must be installed."""
    rank_timeout: int = 600
    """Seconds after which a process that does not answer is taken for dead and the job ends."""
    cache: str | None = None
    """Folder on a local disk that keeps shards fetched from elsewhere; ~/.cache/saliency-shards for
    a remote dataset when not given. A local dataset is copied to it only if it is given."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; half of the free disk when not given."""
    shuffle_shards: int = SHUFFLE_SHARDS
    """Number of shards whose samples are shuffled together."""
    streams: int = 1
    """Number of parts that shards are dealt to for the whole training; with as many as nodes, each
    node reads its own shards only. Divides the batch size."""


def resolved(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The same options with every `auto` and `None` that changes numbers decided.

    Raises:
        UserError: options that make no sense, alone or together.
    """
    positive = {
        **{name: getattr(config, name) for name in POSITIVE},
        "knn.epochs": config.knn.epochs,
        "knn.batch-size": config.knn.batch_size,
    }
    for name, value in positive.items():
        if value is not None and value < 1:
            raise UserError(f"{option(name)} {value}: must be at least 1")
    if config.knn.test_data is not None and config.knn.data is None:
        raise UserError("--knn.test-data: needs --knn.data, the images that its neighbours are of")
    config.method.check(config.recipe)
    parts = world_size() * config.accumulate
    if config.batch_size % parts:
        among = f"among {world_size()} processes"
        if config.accumulate > 1:
            among += f" x {config.accumulate} parts"
        raise UserError(
            f"--batch-size {config.batch_size}: does not divide {among}; "
            f"the nearest that does is {nearest_multiple(config.batch_size, parts)}"
        )
    if config.batch_size == parts:
        raise UserError(
            f"--batch-size {config.batch_size}: one image a process; batch normalisation needs two"
        )
    if not 0 <= config.optim.warmup_epochs < config.epochs:
        raise UserError(
            f"--warmup-epochs {config.optim.warmup_epochs}: must be below --epochs {config.epochs}"
        )
    crop_size = config.crop_size or config.recipe.crop_size
    return replace(
        config,
        crop_size=crop_size,
        recipe=replace(config.recipe, crop_size=crop_size),
        optim=replace(config.optim, lr=config.optim.peak(config.batch_size)),
        precision=pick_precision(config.precision, device),
    )


def cache_of(folder: str | None, gigabytes: float | None) -> Cache:
    """Return the cache that the options `cache` and `cache_gb` name; None stands for a default."""
    return Cache(
        None if folder is None else Path(folder),
        None if gigabytes is None else int(1e9 * gigabytes),
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
    return {"data": dataset_digest, "method": config.method.name, **bound(flatten(config))}


def default_settings(
    method: type[MethodConfig], given: TrainConfig | None = None, decided: TrainConfig | None = None
) -> dict[str, Any]:
    """What a setting counts as that an older version did not know: today's defaults, flat.

    Args:
        method: whose own options are meant.
        given, decided: a run's options before and after `resolved`. Where the run leaves an option
            at a default that is decided by other options, what was decided stands.
    """
    general = defaults_of(TrainConfig)
    defaults = {name: value for name, value in general.items() if not name.startswith("method.")}
    defaults |= {f"method.{name}": value for name, value in defaults_of(method).items()}
    if given is not None and decided is not None:
        own, values = flatten(given), flatten(decided)
        for name, value in defaults.items():
            if name in own and equal(own[name], value):
                defaults[name] = values.get(name, value)
    return bound(defaults)


def bound(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the settings, flat, that may differ between a checkpoint and a run."""
    return {
        name: value
        for name, value in settings.items()
        if name not in FREE and name.split(".")[0] not in FREE
    }


def recipe_name(recipe: Recipe) -> str:
    """The name of a recipe, whatever its views, branch and number of hard negatives are.

    `custom` once its masks or its fill are changed.
    """
    others = {*VIEW_FIELDS, "branch", "hard_negatives"}
    masks = [field.name for field in fields(Recipe) if field.name not in others]
    for name, known in RECIPES.items():
        if all(getattr(recipe, mask) == getattr(known, mask) for mask in masks):
            return name
    return "custom"


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def nearest_multiple(number: int, of: int) -> int:
    return max(1, round(number / of)) * of
