"""Describe a run: on the terminal, in its folder, in the metadata of its encoder."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from pipeline.mounts import find_network_mount
from schemas.counts import format_count
from schemas.json_lines import append_json_line
from schemas.settings import fields_of
from schemas.versions import version_of
from train.config import TrainConfig, collect_settings, find_recipe_name
from train.data import Views
from train.distributed import world_size
from train.methods import Method
from train.optim import OptimConfig
from train.option_ranges import format_flag
from train.preemption import can_handle_signals

PACKAGES = ("saliency-shards", "torch", "torchvision", "nvidia-dali-cuda130", "timm", "numpy")

RESULTS = "results.jsonl"
"""File of a run's folder: one line for each evaluation of its encoder."""


def append_start(
    path: Path, config: TrainConfig, device: torch.device, step: int, data_digest: str
) -> None:
    """Append one JSON line that tells how the run was started, or resumed after `step` steps."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "after_step": step,
        "command": reconstruct_command(),
        "data_digest": data_digest,
        "processes": world_size(),
        "device": name,
        "precision": config.precision,
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "git": read_git_revision(),
    }
    append_json_line(path, row)


def reconstruct_command() -> str:
    """Return the command that repeats this run: the program and its options as given."""
    argv = sys.orig_argv
    program = argv[argv.index("-m") :] if "-m" in argv else argv[1:]
    if world_size() == 1:
        return shlex.join(["python", *program] if "-m" in argv else argv)
    if program[0] == "-u":  # torchrun adds it where it starts Python itself
        program = program[1:]
    elif program[0] != "-m":
        program = ["--no-python", *program]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = f"--nnodes {world_size() // local} " if world_size() > local else ""
    return f"torchrun {nodes}--nproc-per-node {local} {shlex.join(program)}"


def read_git_revision() -> str | None:
    """Return the commit of this code, with `+changes` if files differ; None without a checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        # an installed copy may lie inside another project's checkout, which does not track it
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, check=True)
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # git is missing, or the code was installed from a wheel
    return head.stdout.strip() + ("+changes" if changes.stdout else "")


def describe_run(
    config: TrainConfig, method: Method, views: Views, device: torch.device
) -> list[str]:
    """Return lines that tell what is about to be trained, then notes on unusual options."""
    optim, epoch = config.optim, config.method.epoch_name
    part = config.batch_size // config.grad_accum_steps
    images = config.method.describe_images() or (
        f"recipe {find_recipe_name(config.recipe)}, {config.recipe.crop_size} px"
    )
    total = format_count(views.samples, "image")
    schedule = f"{format_count(config.epochs, epoch)} of {format_count(len(views), 'step')}"
    return [
        f"{config.method.name}, {config.encoder}, {images}, batch {config.batch_size} on "
        f"{world_size()} x {device.type}, {config.precision}",
        f"{optim.optimizer}, lr {optim.peak(config.batch_size):g}, {optim.schedule}, "
        f"{format_count(optim.warmup_epochs, epoch)} of warm-up, "
        f"weight decay {optim.weight_decay:g}",
        f"{schedule}; each drops {views.dropped} of {total} (different ones each {epoch}) that do "
        "not fill a batch"
        if views.dropped
        else f"{schedule}; {total}",
        *filter(None, [views.cache_description]),
        *(
            f"note: {note}"
            for note in [
                *collect_notes(config, device),
                *config.method.notes(config.recipe, part),
                *method.notes(views.samples),
            ]
        ),
    ]


def collect_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """Return notes on options that the user may not have intended, one line each."""
    notes = []
    late = [epoch for epoch in config.optim.milestones if epoch >= config.epochs]
    if config.optim.schedule == "steps" and late:
        notes.append(
            f"the learning rate is to drop at epoch {', '.join(map(str, late))}, but there are "
            f"only {format_count(config.epochs, 'epoch')}; see --milestones"
        )
    notes += [
        f"{flag} is not at its default, but has no effect with {choice}"
        for flag, choice in find_unused_options(config.optim).items()
    ]
    if device.type == "cuda" and world_size() == 1 and (gpus := torch.cuda.device_count()) > 1:
        notes.append(f"one of {gpus} GPUs is used; torchrun --nproc-per-node {gpus} uses all")
    if not can_handle_signals():
        notes.append("not in the main thread: signals and Ctrl-C do not save a checkpoint")
    kind = find_network_mount(config.data)
    if kind and config.cache is None and not config.synthetic:
        notes.append(
            f"{config.data} lies on {kind}: if steps wait for data, --cache FOLDER keeps shards on "
            "a local disk"
        )
    return notes


def find_unused_options(optim: OptimConfig) -> dict[str, str]:
    """Return the flags that differ from their defaults and have no effect, with the reason."""
    defaults = fields_of(OptimConfig())
    changed = {name for name, value in fields_of(optim).items() if value != defaults[name]}
    needs = {
        "milestones": ("schedule", "steps"),
        "decay_norms": ("optimizer", "sgd"),
        "trust_coefficient": ("optimizer", "lars"),
        "trust_clip": ("optimizer", "lars"),
    }
    return {
        format_flag(name): f"{format_flag(field)} {getattr(optim, field)}"
        for name, (field, needed) in needs.items()
        if name in changed and getattr(optim, field) != needed
    }


def build_metadata(config: TrainConfig, name: str, digest: str) -> dict[str, str]:
    """Return what evaluations must know about an encoder; safetensors holds only strings."""
    return {
        "encoder": config.encoder,
        "stem": config.stem,
        "zero_init_residual": str(config.zero_init_residual),
        "method": config.method.name,
        "recipe": find_recipe_name(config.recipe),
        "crop_size": str(config.recipe.crop_size),
        "high_pass": str(config.recipe.high_pass),
        "high_pass_kernel": str(config.recipe.high_pass_kernel),
        "high_pass_sigma": str(config.recipe.high_pass_sigma),
        "settings": json.dumps(collect_settings(config, digest)),
        "epochs": str(config.epochs),
        "seed": str(config.seed),
        "data": name,
        "data_digest": digest,
    }
