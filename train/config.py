"""The options of one training run. Command line, config.yaml and checkpoints all hold these."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from pipeline import Cache
from pipeline.loader import DecodeOn
from pipeline.order import SHUFFLE_SHARDS
from pipeline.recipes import RECIPES, VIEW_FIELDS, Recipe
from schemas import UserError
from schemas.precision import pick_precision
from schemas.settings import (
    are_equal,
    defaults_of,
    find_differences,
    flatten,
    shorten_value,
)
from train.distributed import gather_objects, is_main, world_size
from train.encoders import Stem
from train.methods import METHODS, MethodConfig, MoCoConfig
from train.optim import OptimConfig
from train.option_ranges import check_ranges

# These may differ between a checkpoint and the run that resumes from it: they determine where a run
# reads, writes, computes and decodes, and what it reports. They change results only by rounding.
FREE = {
    "data", "out", "device", "resume", "checkpoint_steps", "keep_checkpoints", "log_steps",
    "cache", "cache_gb", "knn", "wandb", "rank_timeout", "decode_on",
}  # fmt: skip

TOGETHER = {"checkpoint_steps", "log_steps", "knn"}
"""Options among them that say when ranks save, log and evaluate, which they do together."""

NEIGHBORS = (20, 200)
"""Numbers of voting neighbors of the kNN accuracies (k in tables)."""

RENAMED = {
    "accumulate": "grad_accum_steps",
    "optim.trust": "optim.trust_coefficient",
    "optim.drop_epochs": "optim.milestones",
    "knn.neighbours": "knn.neighbors",
}
"""Former names of options in checkpoints, encoder files and config.yaml -> their names today. On
the command line the former names are aliases."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """kNN accuracy of the encoder while it trains; off unless `data` is given."""

    data: str | None = None
    """Labeled shards whose images are the neighbors."""
    test_data: str | None = None
    """Labeled shards to classify; by default `data` itself, leave-one-out."""
    epochs: int = 5
    """Epochs between evaluations; the last epoch is always evaluated."""
    neighbors: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--knn.neighbours",))] = NEIGHBORS
    """Numbers of voting neighbors; one accuracy is reported for each."""
    batch_size: int = 64
    """Images per forward pass on each process; does not change the result."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Pretrain an encoder on masked views of a dataset of shards.

    Under torchrun each process is one rank of the same run; without it there is one process.
    """

    data: str = tyro.MISSING
    """Dataset to train on: a folder that `precompute` wrote, or its URL."""
    out: str = tyro.MISSING
    """Folder of the run; every machine must see the same one."""

    method: Annotated[MethodConfig, tyro.conf.arg(name="")] = field(default_factory=MoCoConfig)
    """Method and its own options."""
    recipe: Recipe = field(default_factory=lambda: RECIPES["hp"])
    """Recipe: how views are cropped and masked."""
    encoder: str = "resnet50"
    """A torchvision ResNet (resnet18 ... resnet152, resnext*, wide_resnet*) or a ConvNet of timm
    (timm:convnext_tiny). Weights start random."""
    stem: Stem = "imagenet"
    """small: a 3 x 3 first convolution of stride 1, no max-pool; for crops of 32 to 64 pixels."""
    zero_init_residual: bool = False
    """Start each residual block as an identity: the weight of its last norm starts at 0."""
    sync_bn: bool = False
    """Compute batch statistics over the images of all processes; MoCo then does not shuffle its
    keys."""
    crop_size: int | None = None
    """Side of a view in pixels; by default that of the recipe."""

    batch_size: int = 256
    """Global batch: images per step over all processes."""
    grad_accum_steps: Annotated[int, tyro.conf.arg(aliases=("--accumulate",))] = 1
    """Gradient accumulation: number of micro-batches into which each process splits its share of a
    batch, to save memory."""
    epochs: int = 200
    """Number of passes over the dataset."""
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    seed: int = 0
    """Random seed for weights, queue, sample order, crops and masks."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU, else cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the networks; the loss is always fp32. auto: bf16 if the device supports it."""
    compile: bool = False
    """Run the encoders through torch.compile. The first steps then take minutes."""
    synthetic: int | None = None
    """Measure the step alone: pretend that the dataset has this many images and repeat one random
    batch that is already on the device. Reads no data."""

    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the last checkpoint in the run's folder. never: refuse if there is one."""
    checkpoint_steps: int | None = None
    """Save a checkpoint every this many steps, in addition to the end of each epoch."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    log_steps: int = 10
    """Steps between two log lines. The host waits for the device at these steps, at checkpoints and
    evaluations, and to save an image of the views after an epoch's first step."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """kNN accuracy of the encoder every few epochs."""
    wandb: str | None = None
    """Also log to this Weights & Biases project; `wandb` must be installed."""
    rank_timeout: int = 600
    """Seconds after which a process that does not answer counts as dead and the job ends."""
    cache: str | None = None
    """Folder on a local disk that keeps downloaded shards; by default ~/.cache/saliency-shards for
    a remote dataset and none for a local one."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; by default half of the free disk,
    counting its own files as free."""
    shuffle_shards: int = SHUFFLE_SHARDS
    """Number of shards whose samples are shuffled together."""
    streams: int = 1
    """Number of groups into which the shards are divided for the whole run; with one per node, each
    node reads only its own shards. Must divide the batch size."""
    decode_on: DecodeOn = "gpu"
    """Device that decodes and crops training images if the run is on a GPU: the GPU, or the CPU,
    which leaves the GPU to the step and needs several cores. Evaluations decode on the GPU."""


def resolve_config(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the same options with every `auto` and `None` that affects results decided.

    Raises:
        UserError: options that make no sense, alone or together.
    """
    # a user's method may have options of the same names with other meanings
    is_own = type(config.method) in METHODS.values()
    check_ranges(flatten(config if is_own else replace(config, method=MoCoConfig())))
    if config.knn.test_data is not None and config.knn.data is None:
        raise UserError("--knn.test-data: needs --knn.data, the images of the neighbors")
    config.method.check(config.recipe)
    micro_batches = world_size() * config.grad_accum_steps
    if config.batch_size % micro_batches:
        among = f"among {world_size()} processes"
        if config.grad_accum_steps > 1:
            among += f" x {config.grad_accum_steps} micro-batches"
        raise UserError(
            f"--batch-size {config.batch_size}: does not divide {among}; "
            f"the nearest that does is {round_to_multiple(config.batch_size, micro_batches)}"
        )
    synchronized = config.grad_accum_steps if config.sync_bn else micro_batches
    normalized = config.batch_size // synchronized
    if normalized == 1:
        raise UserError(
            f"--batch-size {config.batch_size}: batch normalization would see one image at a time; "
            "choose a larger batch or fewer --grad-accum-steps, or --sync-bn on several processes"
        )
    if not 0 <= config.optim.warmup_epochs < config.epochs:
        raise UserError(
            f"--warmup-epochs {config.optim.warmup_epochs}: must be below --epochs {config.epochs}"
        )
    crop_size = config.recipe.crop_size if config.crop_size is None else config.crop_size
    return replace(
        config,
        crop_size=crop_size,
        recipe=replace(config.recipe, crop_size=crop_size),
        optim=replace(config.optim, lr=config.optim.peak(config.batch_size)),
        precision=pick_precision(config.precision, device),
    )


def make_cache(folder: str | None, gigabytes: float | None) -> Cache:
    """Return the cache that the options `cache` and `cache_gb` name; None stands for a default."""
    return Cache(
        None if folder is None else Path(folder),
        None if gigabytes is None else int(1e9 * gigabytes),
    )


def collect_settings(config: TrainConfig, dataset_digest: str) -> dict[str, Any]:
    """Return all settings that a checkpoint must share with the run that resumes from it.

    They are flat: name -> value. `data` is the digest of the dataset's content, so a dataset may
    move.
    """
    settings = drop_free(flatten(config), type(config.method))
    return {"data": dataset_digest, "method": config.method.name, **settings}


def refuse_different_options(
    config: TrainConfig, dataset_digest: str, device: torch.device
) -> None:
    """Compare this rank's options, data and device with rank 0's; every rank must call it.

    With other options ranks would train different weights, or wait for each other. One rank on a
    CPU, because its driver fails, would slow down all others.

    Raises:
        UserError: they differ; the message names each option that does.
    """
    options = collect_settings(config, dataset_digest) | {"device": device.type}
    options |= {
        name: value
        for name, value in flatten(config).items()
        if name.split(".", maxsplit=1)[0] in TOGETHER
    }
    first = gather_objects(options if is_main() else None)[0]
    differences = [
        f"{name} is {shorten_value(current)}, there {shorten_value(of_rank_0)}"
        for name, of_rank_0, current in find_differences(first, options, {})
    ]
    if differences:
        raise UserError(
            f"started with other options or data than rank 0: {'; '.join(differences)}. Give "
            "every machine the same command, data and kind of device"
        )


def collect_default_settings(
    method: type[MethodConfig],
    user_config: TrainConfig | None = None,
    decided: TrainConfig | None = None,
) -> dict[str, Any]:
    """Return the values of settings that an older version lacked: today's defaults, flat.

    Args:
        method: the method whose own options are included.
        user_config, decided: a run's options before and after `resolve_config`. If the run
            leaves an option at a default that depends on other options, the decided value counts.
    """
    general = defaults_of(TrainConfig)
    defaults = {name: value for name, value in general.items() if not name.startswith("method.")}
    defaults |= {f"method.{name}": value for name, value in defaults_of(method).items()}
    if user_config is not None and decided is not None:
        user_values, decided_values = flatten(user_config), flatten(decided)
        for name, value in defaults.items():
            if name in user_values and are_equal(user_values[name], value):
                defaults[name] = decided_values.get(name, value)
    return drop_free(defaults, method)


def drop_free(settings: dict[str, Any], method: type[MethodConfig]) -> dict[str, Any]:
    """Remove the settings that may differ between a checkpoint and the run that resumes from it."""
    free = FREE | {f"method.{name}" for name in method.free}
    return {
        name: value
        for name, value in settings.items()
        if name not in free and name.split(".")[0] not in free
    }


def use_current_names(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings of any version, flat or nested, with options under their names of today."""
    current = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            value = use_current_names(value, f"{path}.")  # noqa: PLW2901
        current[RENAMED.get(path, path).removeprefix(prefix)] = value
    return current


def find_recipe_name(recipe: Recipe) -> str:
    """Return the name of a recipe, whatever its views, branch and number of hard negatives are.

    It is `custom` if the masks or the fill were changed.
    """
    ignored_fields = {*VIEW_FIELDS, "branch", "hard_negatives"}
    masks = [field.name for field in fields(Recipe) if field.name not in ignored_fields]
    for name, candidate in RECIPES.items():
        if all(getattr(recipe, mask) == getattr(candidate, mask) for mask in masks):
            return name
    return "custom"


def round_to_multiple(number: int, base: int) -> int:
    return max(1, round(number / base)) * base
