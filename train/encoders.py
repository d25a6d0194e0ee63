"""Encoders: ConvNets without their classifier, and files of trained ones."""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from schemas import UserError
from schemas.cli import lookup
from schemas.storage import write_atomically
from schemas.timm_networks import PREFIX, is_timm
from schemas.weights import SHOWN, MisfitError, fit_weights, get_shapes, read_weights
from train.distributed import is_main
from train.timm_encoders import build_timm_encoder, is_known_to_timm, is_timm_encoder

# resnet18 ... resnet152, resnext*, wide_resnet*: all torchvision models of the class ResNet.
ENCODERS = {
    name: torchvision.models.get_model_builder(name)
    for name in torchvision.models.list_models(module=torchvision.models)
    if "resne" in name
}
RESNETS = tuple(ENCODERS)
"""Architectures that a file of foreign weights is compared with."""

Stem = Literal["imagenet", "small"]


def build_encoder(name: str, stem: Stem = "imagenet") -> tuple[nn.Module, int]:
    """Build a randomly initialized encoder (N, 3, H, W) -> (N, D) pooled features; return it and D.

    Its state_dict has torchvision's key names without `fc`. Weights come from torch's global RNG.

    Args:
        name: a name in `ENCODERS`, or `timm:` and a ConvNet of timm, whose key names are timm's.
        stem: `imagenet`: torchvision's own, a 7 x 7 convolution of stride 2 and a max-pool;
            `small`: a 3 x 3 convolution of stride 1 and no pool, for images of 32 to 64 pixels (as
            in SimCLR and solo-learn for CIFAR).

    Raises:
        UserError: an unknown or unsuitable network; the small stem for a network of timm.
    """
    if is_timm(name):
        if stem != "imagenet":
            raise UserError(f"--stem {stem}: is for torchvision's ResNets only, not for {name}")
        return build_timm_encoder(name)
    if name not in ENCODERS and is_known_to_timm(name):
        raise UserError(f"unknown encoder {name!r}: did you mean {PREFIX}{name}?")
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

    Source: Goyal et al. 2017; torchvision's `zero_init_residual`, used by google-research/simclr.

    Raises:
        UserError: the module, whose name is `encoder`, has no residual blocks.
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
        raise UserError(f"--zero-init-residual: {encoder} has no residual blocks of a known kind")
    for norm in last:
        nn.init.zeros_(norm.weight)


def compute_feature_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the last map before pooling: (N, 3, H, W) -> (N, D, h, w), at stride 32.

    The small stem makes the stride smaller. `encoder` comes from `build_encoder`; after
    `compile_encoder_` this runs compiled too.
    """
    compiled = getattr(encoder, "compiled_feature_map", None)
    return run_to_last_map(encoder, images) if compiled is None else compiled(encoder, images)


def run_to_last_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """Compute `compute_feature_map` without torch.compile."""
    if is_timm_encoder(encoder):
        network: Any = encoder
        return network.forward_features(images)
    assert isinstance(encoder, torchvision.models.ResNet)
    x = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        x = layer(x)
    return x


def compile_encoder_(encoder: nn.Module) -> None:
    """Compile the encoder's call and its feature map with torch.compile, each at its first use."""
    encoder.compile()
    encoder.compiled_feature_map = torch.compile(run_to_last_map)  # type: ignore[assignment]


def save_encoder(path: Path, encoder: nn.Module, metadata: dict[str, str]) -> None:
    """Write `encoder` to one safetensors file, atomically; `metadata` must name its `encoder`.

    Equal weights and metadata give equal bytes: a probe resumes only on the same file.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
    try:
        write_atomically(path, to_safetensors(tensors, metadata))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the content of a safetensors file; its metadata are sorted, not in random order."""
    file = save(tensors, metadata)
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[start:]


def load_encoder(
    location: str, notes_images: bool = False
) -> tuple[nn.Module, dict[str, str], Path]:
    """Read an encoder; return it on the CPU, its metadata and the path of its file.

    Args:
        location: the folder of a run, its `encoder.safetensors`, or any file of weights that holds
            a ResNet with torchvision's key names under some prefix (see `schemas.weights`). The
            architecture of such foreign weights is found by their shapes, and evaluations feed it
            unfiltered images of FOREIGN_CROP pixels.
        notes_images: print the size of these images, for an evaluation of foreign weights.

    Raises:
        UserError: no such file, or no ResNet in it.
    """
    path = Path(location)
    if path.is_dir():
        path = path / "encoder.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such encoder; has its training finished?")
    content = read_weights(path, unpickle, load_file)
    metadata = read_metadata(path)
    if "encoder" in metadata:
        encoder = build_encoder(metadata["encoder"], get_stem(metadata))[0]
        encoder.load_state_dict(content)
        return encoder, metadata, path
    return *build_foreign_encoder(content, path, notes_images), path


NEARLY = 0.5
"""Share of a network's tensors that a file must have for messages to name that network."""
FOREIGN_CROP: dict[Stem, int] = {"imagenet": 224, "small": 32}
"""Side in pixels of the images on which an encoder that `train` did not write is evaluated."""


def build_foreign_encoder(
    content: Any, path: Path, notes_images: bool
) -> tuple[nn.Module, dict[str, str]]:
    """Build the ResNet whose weights lie in a file that `train` did not write, and its metadata.

    Raises:
        UserError: the file holds no ResNet of torchvision's.
    """
    misfits: dict[str, MisfitError] = {}
    for stem in get_args(Stem):
        for name in RESNETS:
            shapes, children = list_shapes(name, stem)
            try:
                fitted = fit_weights(content, shapes, str(path), f"a {name}", children)
            except MisfitError as error:
                misfits[name if stem == "imagenet" else f"{name} with the small stem"] = error
                continue
            encoder = build_encoder(name, stem)[0]
            encoder.load_state_dict({**encoder.state_dict(), **fitted.tensors})
            if is_main():
                print_once(fitted.note or f"{path}: a {name}")
                if notes_images:
                    print_once(f"{path}: evaluated on plain images of {FOREIGN_CROP[stem]} pixels")
            return encoder, make_foreign_metadata(name, stem, path)
    raise explain_misfits(path, misfits)


@functools.cache
def list_shapes(name: str, stem: Stem = "imagenet") -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Return the shapes of a ResNet's weights by name, and its children; allocates nothing."""
    with torch.device("meta"):
        encoder = build_encoder(name, stem)[0]
    return get_shapes(encoder.state_dict()), [child for child, _ in encoder.named_children()]


def make_foreign_metadata(name: str, stem: Stem, path: Path) -> dict[str, str]:
    """Return the metadata that evaluations need for an encoder whose file has none."""
    return {
        "encoder": name,
        "stem": stem,
        "method": path.name,
        "recipe": "none",
        "crop_size": str(FOREIGN_CROP[stem]),
        "high_pass": "False",
        "high_pass_kernel": "11",  # unused without high_pass
        "high_pass_sigma": "5.0",
        "settings": json.dumps({"recipe.fill": "none", "sha256": compute_digest(path)}),
        "seed": "0",
    }


def explain_misfits(path: Path, misfits: dict[str, MisfitError]) -> UserError:
    """Return the error for a file that holds none of the known encoders.

    Args:
        misfits: why each encoder does not fit, by its name.
    """
    nearest, misfit = max(misfits.items(), key=lambda item: item[1].fitting)
    if not misfit.names:
        return misfit
    if misfit.fitting > NEARLY:
        problem = f"the nearest is {nearest}, but the file {misfit.problem}"
    else:
        own_names = ", ".join(list(list_shapes("resnet18")[0])[:SHOWN])
        problem = f"it has {misfit.names} ..., a ResNet {own_names} ..."
    return UserError(
        f"{path}: fits none of the known encoders ({', '.join(RESNETS)}): {problem}; give a file "
        "of one of them, or the encoder.safetensors of a run, which names its encoder"
    )


@functools.cache
def print_once(text: str) -> None:
    """Print a line once per process, however often a file is read."""
    print(text, flush=True)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata that `save_encoder` wrote; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def unpickle(path: Path, stubs: Sequence[tuple[type, str]]) -> Any:
    with torch.serialization.safe_globals(list(stubs)):
        return torch.load(path, map_location="cpu", weights_only=True)


def compute_digest(path: Path) -> str:
    """Return the sha256 of an encoder's file, which identifies it wherever it lies."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_stem(metadata: dict[str, str]) -> Stem:
    """Return the stem that metadata names; files older than this option have the usual one."""
    return "small" if metadata.get("stem") == "small" else "imagenet"


def build_untrained_encoder(metadata: dict[str, str], seed: int) -> nn.Module:
    """Build the same architecture untrained, from `seed` alone; torch's global RNG is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(metadata["encoder"], get_stem(metadata))[0]
    if metadata.get("zero_init_residual") == "True":
        zero_residual_gammas_(encoder, metadata["encoder"])
    return encoder
