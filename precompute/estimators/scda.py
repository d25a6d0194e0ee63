"""Relaxed-SCDA saliency: the activity of a ConvNet's last convolutional map.

Wei et al., "Selective Convolutional Descriptor Aggregation", IEEE TIP 2017: the aggregation map A
is the sum over channels of the last convolutional map, after its ReLU. The relaxed rule of "Masking
Improves Contrastive Self-Supervised Learning for ConvNets" (WACV 2024) takes as foreground the
cells of a view with A >= mean(A) - 0.6 std(A). The map is stored and not the outcome of the rule,
because the mean and std differ for every crop.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torchvision
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from precompute.estimators.maps import standardize
from precompute.estimators.options import ScdaOptions
from precompute.estimators.weights import compute_sha256, load_weights
from precompute.estimators.windows import Window, cut, list_windows, paste
from schemas.cli import lookup
from schemas.errors import UserError
from schemas.precision import autocast, pick_precision
from schemas.timm_networks import build_convnet, is_timm

# ImageNet's RGB mean and std on [0, 1], with which torchvision's weights were trained
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

WINDOWS_AT_ONCE = {"cpu": 64, "cuda": 256}
"""Number of windows in one forward pass, by device: large enough to keep a GPU busy, and fixed so
that memory does not depend on the images' shapes."""

Place = tuple[int, Window]
"""Index of an image in a batch, and a window in that image."""


class ScdaEstimator:
    """Estimator of relaxed-SCDA maps; see `Estimator` and `ScdaOptions`.

    Raises:
        UserError: the backbone or the weights are unknown, the weights do not fit or cannot be
            downloaded, or the network has no convolutional map.
    """

    def __init__(self, options: ScdaOptions, device: str = "auto"):
        self.options = options
        self.side = options.side
        self.device = device
        if device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)  # random weights are the same in every worker
        model = build_backbone(options.backbone)
        trunk = build_trunk(model.eval(), options.backbone, options.layer)
        load_weights(trunk, model, options.backbone, options.weights)
        self.weights_sha256 = compute_sha256(trunk.state_dict())
        self.precision = pick_precision(options.precision, torch.device(self.device))
        self.trunk = prepare(trunk, self.device, self.precision)
        if options.compile:
            self.trunk.compile()
        self.mean = torch.tensor(MEAN, device=self.device) * 255
        self.std = torch.tensor(STD, device=self.device) * 255

    @property
    def network_on_gpu(self) -> bool:
        return self.device == "cuda"

    @torch.inference_mode()
    def __call__(self, images: Any) -> np.ndarray:
        shapes = [tuple(image.shape[:2]) for image in images]
        areas = self.options.areas
        levels_places = [list_places(shapes, area) for area in areas]
        maps = torch.cat(
            [
                self.aggregate(cut(images, chunk, self.options.size))
                for chunk in self.split_windows(levels_places)
            ]
        ).cpu()
        counts = [len(places) for places in levels_places]
        levels = [
            standardize(paste(part, shapes, area, self.side))
            for part, area in zip(maps.split(counts), areas, strict=True)
        ]
        return torch.stack(levels).mean(dim=0).numpy()

    def split_windows(self, levels: list[list[Place]]) -> Iterator[list[Place]]:
        """Split the windows of all areas into forward passes.

        On a GPU, a pass may mix areas, which gives fewer and fuller passes. On a CPU this gains
        nothing, and would change the last bits of maps when older datasets are resumed.
        """
        if self.device == "cuda":
            levels = [[place for level in levels for place in level]]
        for level in levels:
            at_once = WINDOWS_AT_ONCE[self.device]
            yield from (level[n : n + at_once] for n in range(0, len(level), at_once))

    def aggregate(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the aggregation map A of (N, size, size, 3) uint8 pixels.

        Returns:
            (N, u, v) float32, on the estimator's device.
        """
        pixels = pixels.to(self.device)
        normalized = (pixels.float() - self.mean) / self.std
        inputs = normalized.permute(0, 3, 1, 2)  # NHWC in memory: channels_last, no copy
        with autocast(self.precision, pixels.device):
            activation = self.trunk(inputs)["map"]  # (N, D, U, V)
        return activation.float().sum(dim=1)


def list_places(shapes: list[tuple[int, int]], area: float) -> list[Place]:
    """Return the windows of one area of all images."""
    return [(i, window) for i, shape in enumerate(shapes) for window in list_windows(*shape, area)]


def prepare(trunk: nn.Module, device: str, precision: str) -> nn.Module:
    """Move the trunk to the device and optimize it for inference, with channels_last weights.

    On a GPU, each batch norm is folded into the convolution before it, which saves a pass over
    memory, and weights are stored in bf16, so that autocast does not cast them in every forward
    pass. Folding changes the last bits of the maps; a CPU spends its time in the convolutions
    themselves, so it runs the network unchanged.
    """
    prepared: nn.Module = trunk.requires_grad_(False).to(device)
    if device == "cuda":
        if isinstance(trunk, fx.GraphModule):  # timm networks run unchanged
            prepared = fold_batch_norms(trunk)
        if precision == "bf16":
            cast_convolutions_(prepared)
    return prepared.to(memory_format=torch.channels_last)


def cast_convolutions_(trunk: nn.Module) -> None:
    """Store convolution and linear weights in bf16, sparing autocast the casts; norms stay fp32."""
    for module in trunk.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(torch.bfloat16)


def fold_batch_norms(trunk: fx.GraphModule) -> nn.Module:
    """Return a copy with every batch norm merged into the convolution before it."""
    # torchvision's module also has a graph for training, of which a copy would be in training mode
    evaluated = fx.GraphModule(trunk, trunk.graph).eval()
    return fuse(evaluated, no_trace=True).eval().requires_grad_(False)


def build_backbone(name: str) -> nn.Module:
    """Build a torchvision network, or a timm network named `timm:NAME`. Raises UserError."""
    if is_timm(name):
        return build_convnet("backbone", name)
    choices = {name: name for name in torchvision.models.list_models(torchvision.models)}
    return torchvision.models.get_model(lookup("backbone", name, choices))


def build_trunk(model: nn.Module, name: str, layer: str) -> nn.Module:
    """Return the part of a network up to a layer's output. Raises UserError.

    Args:
        layer: name of the layer; "" for the last convolutional map.
    """
    if not layer:
        return find_last_map(model, name)
    _, nodes = get_graph_node_names(model)
    inner = {node for node in nodes if node == layer or node.startswith(f"{layer}.")}
    if not inner:
        raise UserError(f"backbone {name} has no layer {layer!r}: there are {', '.join(nodes)}")
    return create_feature_extractor(model, {layer: "map"}).eval()


def find_last_map(model: nn.Module, name: str) -> fx.GraphModule:
    """Return the part of a network up to its last map that still has a height and a width.

    This is the last 4-d value with more than one cell, whatever its name: layer4 of ResNets,
    `features` of MobileNetV2, the ReLU after the last norm of DenseNets. Raises UserError.
    """
    probe = torch.zeros(1, 3, 224, 224)
    try:
        _, nodes = get_graph_node_names(model)
        with torch.inference_mode():
            values = create_feature_extractor(model, nodes)(probe)
    except Exception as error:  # torch.fx raises many kinds of errors for untraceable networks
        raise UserError(f"backbone {name}: torch.fx cannot trace it ({error})") from error
    maps = [
        node
        for node, value in values.items()
        if isinstance(value, torch.Tensor) and value.ndim == 4 and min(value.shape[-2:]) > 1
    ]
    behind = [values[node] for node in nodes[nodes.index(maps[-1]) :]]
    if maps[-1] == nodes[0] or any(torch.is_tensor(v) and v.ndim == 3 for v in behind):
        raise UserError(f"backbone {name}: its last map is of patches for tokens; choose a CNN")
    return create_feature_extractor(model, {maps[-1]: "map"}).eval()
