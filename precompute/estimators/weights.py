"""Load a backbone's weights by torchvision's name or by path, or leave them random."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from schemas.cli import lookup
from schemas.errors import UserError
from schemas.timm_networks import PREFIX, import_timm, is_timm
from schemas.weights import fit_weights, get_shapes, read_weights

RANDOM = "random"
TIMM_DEFAULT = "DEFAULT"
"""Selects timm's default weights for a network's name; `name.tag` selects others."""


def load_weights(trunk: nn.Module, model: nn.Module, backbone: str, weights: str) -> None:
    """Load weights into the trunk of a backbone.

    In a file, the trunk's parameter names may have any prefix, and other layers (a classifier, a
    projector) may be present: see `schemas.weights`.

    Raises:
        UserError: there is no such name or file, the download fails, or the weights belong to
            another network.
    """
    if weights == RANDOM:
        return
    path = find_file(backbone, weights)
    content = download(backbone, weights) if path is None else read_weights(path, unpickle, unpack)
    state = trunk.state_dict()
    children = [name for name, _ in model.named_children()]
    fit = fit_weights(content, get_shapes(state), weights, backbone, children)
    if fit.note:
        print(fit.note, flush=True)
    # load_state_dict casts float16 files to the trunk's float32
    trunk.load_state_dict({**state, **fit.tensors})


def find_file(backbone: str, weights: str) -> Path | None:
    """Return the file that `weights` names, or None for the name of published weights.

    For the folder of a training run, the file is its encoder.
    """
    if weights in list_published(backbone):
        return None
    path = Path(weights)
    if path.is_dir():
        path = path / "encoder.safetensors"
    return path if path.exists() or path.suffix or path.parent != Path() else None


def unpickle(path: Path, stubs: Sequence[tuple[type, str]]) -> Any:
    with torch.serialization.safe_globals(list(stubs)):
        return torch.load(path, map_location="cpu", weights_only=True)


def unpack(path: Path) -> Any:
    import safetensors.torch  # imported here, because published weights do not need it

    return safetensors.torch.load_file(path)


def list_published(backbone: str) -> dict[str, Callable[[], Mapping[str, torch.Tensor]]]:
    """Return functions that load the weights published for a backbone, by the weights' name."""
    if is_timm(backbone):
        create = partial(import_timm("backbone", backbone).create_model, pretrained=True)
        return {TIMM_DEFAULT: lambda: create(backbone.removeprefix(PREFIX)).state_dict()}
    members = torchvision.models.get_model_weights(backbone).__members__
    return {
        name: partial(member.get_state_dict, check_hash=True) for name, member in members.items()
    }


def download(backbone: str, name: str) -> Mapping[str, torch.Tensor]:
    """Return weights that torchvision or timm publishes, cached or downloaded. Raises UserError."""
    published = list_published(backbone)
    if is_timm(backbone) and name not in published:
        raise UserError(
            f"weights {name!r} of {backbone}: give {TIMM_DEFAULT}, random or the path of a file; "
            "timm's other weights have a tag in the name, timm:NAME.TAG"
        )
    load = lookup(f"weights of {backbone}", name, {**published, RANDOM: None})
    try:
        return load()
    except Exception as error:  # timm uses various clients: requests, httpx, huggingface_hub
        raise UserError(
            f"weights {name} of {backbone} could not be downloaded ({error}); give a file by "
            "--estimator.weights PATH, or use --estimator spectral, which needs none"
        ) from error


def compute_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 over names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
