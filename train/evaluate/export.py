"""The command `export`: write an encoder in the format of another library."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from schemas import UserError
from schemas.settings import flatten
from schemas.storage import translate_os_errors, write_atomically
from schemas.timm_networks import is_timm
from train.encoders import get_stem, load_encoder, to_safetensors
from train.option_ranges import check_ranges

Format = Literal["torchvision", "timm", "safetensors", "detectron2"]
SUFFIX: dict[Format, str] = {
    "torchvision": ".pth",
    "timm": ".pth",
    "safetensors": ".safetensors",
    "detectron2": ".pkl",
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write an encoder for another library."""

    encoder: str = tyro.MISSING
    """Folder of a run, or a file of weights: encoder.safetensors or a foreign checkpoint."""
    format: Format = "torchvision"
    """torchvision: a state_dict without fc, for load_state_dict(..., strict=False). timm: the
    state_dict of an encoder timm:NAME, for timm.create_model(NAME, num_classes=0). safetensors: the
    same keys in that format. detectron2: the pickle of MoCo's convert-pretrain.py, for R50-C4 and
    similar models."""
    out: str | None = None
    """File to write; by default in the encoder's folder."""


def export(options: ExportOptions) -> Path:
    """Write the file and return its path.

    Raises:
        UserError: no such encoder, the format does not suit its architecture, or the file cannot be
            written or is the encoder itself.
    """
    check_ranges(flatten(options))
    encoder, metadata, path = load_encoder(options.encoder)
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    out = Path(options.out or path.with_name(f"{options.format}{SUFFIX[options.format]}"))
    if out.resolve() == path.resolve():
        raise UserError(f"{out}: is the encoder itself; write to another file with --out")
    if options.format != "safetensors":
        check_family(options.format, metadata["encoder"], str(path))
        if get_stem(metadata) != "imagenet":
            raise UserError(
                f"{path}: has the small stem, which {options.format}'s ResNets do not have; take "
                "--format safetensors, with train.encoders.build_encoder(NAME, 'small') to load it"
            )
    with translate_os_errors(str(out)):
        write_atomically(out, encode_state(state, metadata, options.format))
    return out


def encode_state(state: dict[str, Tensor], metadata: dict[str, str], form: Format) -> bytes:
    """Return the content of a file in the format."""
    if form == "safetensors":
        return to_safetensors(state, metadata)
    if form == "detectron2":
        content = {
            "model": {to_detectron2_name(name): to_numpy(x) for name, x in state.items()},
            "__author__": "saliency-shards",
            "matching_heuristics": True,
        }
        return pickle.dumps(content)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def check_family(form: Format, encoder: str, path: str) -> None:
    """Raise UserError if the key names of a network are not those of the format."""
    if is_timm(encoder) and form != "timm":
        raise UserError(
            f"{path}: is {encoder}, whose key names {form} does not know; take --format timm or "
            "safetensors"
        )
    if form == "timm" and not is_timm(encoder):
        raise UserError(f"{path}: is torchvision's {encoder}; take --format torchvision")


def to_detectron2_name(name: str) -> str:
    """Translate torchvision's name of a weight to detectron2's (MoCo's convert-pretrain.py).

    >>> to_detectron2_name("layer1.0.downsample.1.running_mean")
    'res2.0.shortcut.norm.running_mean'
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for number in range(1, 5):
        name = name.replace(f"layer{number}", f"res{number + 1}")
    for number in range(1, 4):
        name = name.replace(f"bn{number}", f"conv{number}.norm")
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def to_numpy(value: Tensor) -> object:
    return value.detach().cpu().numpy()
