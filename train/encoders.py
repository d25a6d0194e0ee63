"""Encoders: torchvision ResNets without their classifier, and the file that holds a trained one."""

import hashlib
import os
from pathlib import Path
from typing import Literal

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from schemas import UserError
from schemas.cli import lookup

# resnet18 ... resnet152, resnext*, wide_resnet*: all torchvision models of the class ResNet.
ENCODERS = {
    name: torchvision.models.get_model_builder(name)
    for name in torchvision.models.list_models(module=torchvision.models)
    if "resne" in name
}


Stem = Literal["imagenet", "small"]


def build_encoder(name: str, stem: Stem = "imagenet") -> tuple[nn.Module, int]:
    """A randomly initialised encoder (N, 3, H, W) -> (N, D) pooled features, and its D.

    Its state_dict has torchvision's key names without `fc`. Weights come from torch's global RNG.

    Args:
        name: of `ENCODERS`.
        stem: `imagenet`: torchvision's own, a 7 x 7 convolution of stride 2 and a max-pool;
            `small`: 3 x 3 of stride 1 and no pool, for images of 32 to 64 pixels (as SimCLR and
            solo-learn have it for CIFAR).

    Raises:
        UserError: no such torchvision ResNet.
    """
    encoder = lookup("encoder", name, ENCODERS)(weights=None)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "small":
        encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, features


def feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """The last map before pooling: (N, 3, H, W) -> (N, D, h, w), at stride 32 with its usual stem.

    `encoder` is one of `build_encoder`; after `compile_encoder_` this runs compiled too.
    """
    compiled = getattr(encoder, "compiled_feature_map", None)
    return compute_feature_map(encoder, images) if compiled is None else compiled(encoder, images)


def compute_feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """`feature_map` without a compiler."""
    assert isinstance(encoder, torchvision.models.ResNet)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = layer(x)
    return x


def compile_encoder_(encoder: nn.Module) -> None:
    """Let torch.compile run the encoder's call and its `feature_map`, each from its first use."""
    encoder.compile()
    encoder.compiled_feature_map = torch.compile(compute_feature_map)  # type: ignore[assignment]


def save_encoder(path: Path, encoder: nn.Module, metadata: dict[str, str]) -> None:
    """Write `encoder` to one safetensors file, atomically; `metadata` must name its `encoder`.

    Raises:
        UserError: it cannot be written.
    """
    tensors = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:  # the latter when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error})") from error
    temporary.replace(path)


def load_encoder(location: str) -> tuple[nn.Module, dict[str, str], Path]:
    """Read what `save_encoder` wrote: (encoder on the CPU, metadata, the file's path).

    Args:
        location: the safetensors file, or the folder of the run that wrote `encoder.safetensors`.

    Raises:
        UserError: no such file, or not one that `save_encoder` wrote.
    """
    path = Path(location)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such encoder; has its training ended?")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if "encoder" not in metadata:
        raise UserError(f"{path}: names no encoder in its metadata; not written by train")
    encoder = build_encoder(metadata["encoder"], stem_of(metadata))[0]
    encoder.load_state_dict(tensors)
    return encoder, metadata, path


def digest(path: Path) -> str:
    """sha256 of an encoder's file: what it was, when a path no longer tells."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stem_of(metadata: dict[str, str]) -> Stem:
    """The stem that an encoder's metadata names; files of before there was a choice name none."""
    return "small" if metadata.get("stem") == "small" else "imagenet"


def untrained_encoder(metadata: dict[str, str], seed: int) -> nn.Module:
    """The same architecture as first initialised, from `seed` alone; torch's global RNG stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(metadata["encoder"], stem_of(metadata))[0]
