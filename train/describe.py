"""What a run says of itself: on the terminal, in config.yaml, in its encoder's metadata."""

import json
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml

from pipeline import MaskedViews
from schemas import ShardDataset
from train.config import TrainConfig, recipe_name, settings_of
from train.distributed import world_size
from train.methods import Method, method_of


def write_config(
    path: Path, settings: dict[str, Any], config: TrainConfig, device: torch.device
) -> None:
    """The options as they were decided, and what they ran on."""
    where = {
        "data": config.data,
        "data_digest": settings["data"],
        "device": str(device),
        "processes": world_size(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }
    content = {**settings, **where}
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def introduction(
    config: TrainConfig,
    method: Method,
    views: MaskedViews,
    device: torch.device,
) -> list[str]:
    """What is about to happen, one line each."""
    return [
        f"{method.name}, {config.encoder}, recipe {recipe_name(config.recipe)}, "
        f"{config.recipe.crop_size} px, batch {config.batch_size} on {world_size()} x "
        f"{device.type}, {config.precision}",
        f"{config.epochs} epochs of {len(views)} steps; each leaves out {views.dropped} of "
        f"{views.samples} images, other ones each time, which do not fill a batch",
        *(f"note: {note}" for note in method.notes(views.samples)),
    ]


def metadata_of(config: TrainConfig, dataset: ShardDataset) -> dict[str, str]:
    """What an evaluation must know of an encoder; safetensors holds strings only."""
    return {
        "encoder": config.encoder,
        "method": method_of(config.method).name,
        "recipe": recipe_name(config.recipe),
        "crop_size": str(config.recipe.crop_size),
        "high_pass": str(config.recipe.high_pass),
        "high_pass_kernel": str(config.recipe.high_pass_kernel),
        "high_pass_sigma": str(config.recipe.high_pass_sigma),
        "settings": json.dumps(settings_of(config, dataset.digest)),
        "epochs": str(config.epochs),
        "seed": str(config.seed),
        "data": dataset.card.name,
        "data_digest": dataset.digest,
    }
