"""Weights of a backbone: by torchvision's name, by path, or random when asked for."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import nn

from schemas.cli import lookup
from schemas.errors import UserError

RANDOM = "random"
SUFFIXES = {".pt", ".pth", ".safetensors"}


def load_weights(trunk: nn.Module, model: nn.Module, backbone: str, weights: str) -> None:
    """Fill the trunk of a backbone.

    Keys of the rest of the backbone (a classifier) may be there or not; every key of the trunk must
    be there, and a key of neither is refused.

    Raises:
        UserError: no such name or file, a failed download, or weights of another network.
    """
    if weights == RANDOM:
        return
    if Path(weights).suffix in SUFFIXES:
        state = read_state(Path(weights))
    else:
        state = download(backbone, weights)
    wanted, whole = trunk.state_dict(), model.state_dict()
    missing = [key for key in wanted if key not in state and not key.endswith("batches_tracked")]
    unknown = [key for key in state if key not in whole]
    misshapen = [k for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("misshapes", misshapen)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{weights}: not weights of {backbone}: it {problem} {', '.join(keys[:3])}{more}"
            )
    # load_state_dict casts float16 files to the trunk's float32
    trunk.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})


def read_state(path: Path) -> Mapping[str, torch.Tensor]:
    """A state_dict from a file, by its suffix. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    unreadable: tuple[type[Exception], ...] = (OSError, RuntimeError, EOFError)
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch  # here: networks by torchvision's names need none

            unreadable += (safetensors.SafetensorError,)
            state = safetensors.torch.load_file(path)
        else:
            unreadable += (pickle.UnpicklingError,)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except unreadable as error:
        raise UserError(f"{path}: not a readable state_dict ({error})") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"{path}: not a state_dict: it must map names to tensors")
    return state


def download(backbone: str, name: str) -> Mapping[str, torch.Tensor]:
    """Weights that torchvision publishes, from its cache or the network. Raises UserError."""
    known = torchvision.models.get_model_weights(backbone).__members__
    chosen = lookup(f"weights of {backbone}", name, {**known, RANDOM: None})
    try:
        return chosen.get_state_dict(check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"weights {name} of {backbone} could not be downloaded ({error}); give a file by "
            "--estimator.weights PATH, or use --estimator spectral, which needs none"
        ) from error


def sha256_of(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
