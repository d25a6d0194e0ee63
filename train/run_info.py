"""What a run says of itself: on the terminal, in its folder, in its encoder's metadata."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.cache import network_mount
from train.config import TrainConfig, recipe_name, settings_of
from train.distributed import world_size
from train.data import Views
from train.methods import Method

PACKAGES = ("saliency-shards", "torch", "torchvision", "nvidia-dali-cuda130", "timm", "numpy")


def write_start(
    path: Path, config: TrainConfig, device: torch.device, step: int, data_digest: str
) -> None:
    """Append how the run was started, or started again after `step` steps: one JSON line each."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": step,
        "command": command(),
        "data_digest": data_digest,
        "processes": world_size(),
        "device": name,
        "precision": config.precision,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "git": git_revision(),
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def command() -> str:
    """What repeats this run: the program and its options as they were given."""
    given = sys.orig_argv
    if "-m" not in given:
        return shlex.join(given)
    start = "python"
    if world_size() > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
        nodes = f"--nnodes {world_size() // local} " if world_size() > local else ""
        start = f"torchrun {nodes}--nproc-per-node {local}"
    return f"{start} {shlex.join(given[given.index('-m') :])}"


def git_revision() -> str | None:
    """The commit of this code, with `+changes` if files differ; None where it is no checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or installed from a wheel
    return found.stdout.strip() + ("+changes" if changes.stdout else "")


def introduction(
    config: TrainConfig, method: Method, views: Views, device: torch.device
) -> list[str]:
    """What is about to happen, one line each."""
    optim = config.optim
    of_method = config.method.notes(config.recipe, config.batch_size // config.accumulate)
    return [
        f"{config.method.name}, {config.encoder}, recipe {recipe_name(config.recipe)}, "
        f"{config.recipe.crop_size} px, batch {config.batch_size} on {world_size()} x "
        f"{device.type}, {config.precision}",
        f"{optim.optimizer}, lr {optim.peak(config.batch_size):g}, {optim.schedule}, "
        f"{optim.warmup_epochs} epochs of warm-up, weight decay {optim.weight_decay:g}",
        f"{config.epochs} epochs of {len(views)} steps; each drops {views.dropped} of "
        f"{views.samples} images (different ones each epoch) that do not fill a batch",
        *filter(None, [views.cache_description]),
        *(
            f"note: {note}"
            for note in [*notes(config, device), *of_method, *method.notes(views.samples)]
        ),
    ]


def notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What a person may not have meant; one line each."""
    found = []
    late = [epoch for epoch in config.optim.drop_epochs if epoch >= config.epochs]
    if config.optim.schedule == "steps" and late:
        found.append(
            f"the rate is to drop at epoch {', '.join(map(str, late))}, and there are "
            f"{config.epochs} epochs; see --drop-epochs"
        )
    if device.type == "cuda" and world_size() == 1 and (count := torch.cuda.device_count()) > 1:
        found.append(f"one of {count} GPUs is used; torchrun --nproc-per-node {count} takes all")
    kind = network_mount(config.data)
    if kind and config.cache is None and not config.synthetic:
        found.append(
            f"{config.data} lies on {kind}: where steps wait for data, --cache FOLDER keeps shards "
            "on a local disk"
        )
    return found


def metadata_of(config: TrainConfig, name: str, digest: str) -> dict[str, str]:
    """What an evaluation must know of an encoder; safetensors holds strings only."""
    return {
        "encoder": config.encoder,
        "stem": config.stem,
        "zero_init_residual": str(config.zero_init_residual),
        "method": config.method.name,
        "recipe": recipe_name(config.recipe),
        "crop_size": str(config.recipe.crop_size),
        "high_pass": str(config.recipe.high_pass),
        "high_pass_kernel": str(config.recipe.high_pass_kernel),
        "high_pass_sigma": str(config.recipe.high_pass_sigma),
        "settings": json.dumps(settings_of(config, digest)),
        "epochs": str(config.epochs),
        "seed": str(config.seed),
        "data": name,
        "data_digest": digest,
    }
