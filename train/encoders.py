"""Encoders: ConvNets without their classifier, and the file that holds a trained one."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from schemas import UserError
from schemas.cli import lookup
from schemas.weights import fit_weights, read_weights, shapes_of
from train.distributed import is_main
from train.timm_encoders import build_timm_encoder, is_timm, is_timm_encoder

# resnet18 ... resnet152, resnext*, wide_resnet*: all torchvision models of the class ResNet.
ENCODERS = {
    name: torchvision.models.get_model_builder(name)
    for name in torchvision.models.list_models(module=torchvision.models)
    if "resne" in name
}
RESNETS = tuple(ENCODERS)
"""Those that a file from elsewhere is compared with."""

Stem = Literal["imagenet", "small"]


def build_encoder(name: str, stem: Stem = "imagenet") -> tuple[nn.Module, int]:
    """A randomly initialised encoder (N, 3, H, W) -> (N, D) pooled features, and its D.

    Its state_dict has torchvision's key names without `fc`. Weights come from torch's global RNG.

    Args:
        name: of `ENCODERS`, or `timm:` and a ConvNet of timm, whose key names are timm's.
        stem: `imagenet`: torchvision's own, a 7 x 7 convolution of stride 2 and a max-pool;
            `small`: 3 x 3 of stride 1 and no pool, for images of 32 to 64 pixels (as SimCLR and
            solo-learn have it for CIFAR).

    Raises:
        UserError: no such network, or not one that the method is for; the small stem for a network
            of timm.
    """
    if is_timm(name):
        if stem != "imagenet":
            raise UserError(f"--stem {stem}: is for torchvision's ResNets, not for {name}")
        return build_timm_encoder(name)
    encoder = lookup("encoder", name, ENCODERS)(weights=None)
    features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if stem == "small":
        encoder.conv1 = nn.Conv2d(3, encoder.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, features


def zero_residual_gammas_(module: nn.Module, encoder: str) -> None:
    """Set the last norm's weight of each residual block to 0, so that blocks start as identities.

    Goyal et al. 2017; torchvision's `zero_init_residual`, which google-research/simclr has on.

    Raises:
        UserError: the module has no such blocks; `encoder` is its name.
    """
    last = [
        block.bn3 if isinstance(block, Bottleneck) else block.bn2
        for block in module.modules()
        if isinstance(block, BasicBlock | Bottleneck)
    ]
    timm_blocks: list[Any] = [m for m in module.modules() if hasattr(m, "zero_init_last")]
    for block in timm_blocks:
        block.zero_init_last()
    if not last and not timm_blocks:
        raise UserError(f"--zero-init-residual: {encoder} has no residual blocks that it knows")
    for norm in last:
        nn.init.zeros_(norm.weight)


def feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """The last map before pooling: (N, 3, H, W) -> (N, D, h, w), at stride 32 with its usual stem.

    `encoder` is one of `build_encoder`; after `compile_encoder_` this runs compiled too.
    """
    compiled = getattr(encoder, "compiled_feature_map", None)
    return compute_feature_map(encoder, images) if compiled is None else compiled(encoder, images)


def compute_feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """`feature_map` without a compiler."""
    if is_timm_encoder(encoder):
        network: Any = encoder
        return network.forward_features(images)
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
    """Read an encoder: (encoder on the CPU, metadata, the file's path).

    Args:
        location: the folder of a run, its `encoder.safetensors`, or any file of weights in which a
            ResNet of torchvision's names lies under some prefix (see `schemas.weights`). Of the
            latter the architecture is found by its shapes, and evaluations show it plain images of
            FOREIGN_CROP pixels.

    Raises:
        UserError: no such file, or no ResNet in it.
    """
    path = Path(location)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such encoder; has its training ended?")
    content = read_weights(path, unpickle, load_file)
    metadata = metadata_of(path)
    if "encoder" in metadata:
        encoder = build_encoder(metadata["encoder"], stem_of(metadata))[0]
        encoder.load_state_dict(content)
        return encoder, metadata, path
    return *foreign_encoder(content, path), path


FOREIGN_CROP: dict[Stem, int] = {"imagenet": 224, "small": 32}
"""Side in pixels of the images that an encoder from elsewhere is evaluated on."""


def foreign_encoder(content: Any, path: Path) -> tuple[nn.Module, dict[str, str]]:
    """The ResNet in the content of a file that `train` did not write, and metadata for it.

    Raises:
        UserError: it has none, or one that torchvision does not know.
    """
    problem: UserError | None = None
    for stem in get_args(Stem):
        for name in RESNETS:
            shapes, children = architecture(name, stem)
            try:
                found = fit_weights(content, shapes, str(path), f"a {name}", children)
            except UserError as error:
                problem = nearer(problem, error)
                continue
            encoder = build_encoder(name, stem)[0]
            encoder.load_state_dict({**encoder.state_dict(), **found.tensors})
            if is_main():
                tell(
                    f"{found.told or f'{path}: a {name}'}; evaluated on plain images of "
                    f"{FOREIGN_CROP[stem]} pixels"
                )
            return encoder, foreign_metadata(name, stem, path)
    assert problem is not None
    raise problem


@functools.cache
def architecture(name: str, stem: Stem) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Names and shapes of a ResNet's weights, and its parts in order; nothing is allocated."""
    with torch.device("meta"):
        encoder = build_encoder(name, stem)[0]
    return shapes_of(encoder.state_dict()), [child for child, _ in encoder.named_children()]


def foreign_metadata(name: str, stem: Stem, path: Path) -> dict[str, str]:
    """What evaluations must know of an encoder, where nobody wrote it down."""
    return {
        "encoder": name,
        "stem": stem,
        "method": path.name,
        "recipe": "none",
        "crop_size": str(FOREIGN_CROP[stem]),
        "high_pass": "False",
        "high_pass_kernel": "11",  # of no use without high_pass
        "high_pass_sigma": "5.0",
        "settings": json.dumps({"recipe.fill": "none", "sha256": digest(path)}),
        "seed": "0",
    }


def nearer(one: UserError | None, other: UserError) -> UserError:
    """Of two refusals the one that is about a shape or a layer rather than about all names."""
    if one is None or ("lacks conv1.weight" in str(one) and "lacks conv1.weight" not in str(other)):
        return other
    return one


@functools.cache
def tell(text: str) -> None:
    """Print a line once, however often a file is read."""
    print(text, flush=True)


def metadata_of(path: Path) -> dict[str, str]:
    """What `save_encoder` kept beside the weights; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def unpickle(path: Path, stubs: Sequence[tuple[type, str]]) -> Any:
    with torch.serialization.safe_globals(list(stubs)):
        return torch.load(path, map_location="cpu", weights_only=True)


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
        encoder = build_encoder(metadata["encoder"], stem_of(metadata))[0]
    if metadata.get("zero_init_residual") == "True":
        zero_residual_gammas_(encoder, metadata["encoder"])
    return encoder
