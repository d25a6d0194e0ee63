"""Relaxed-SCDA saliency: where a ConvNet's last map is active.

Wei et al., "Selective Convolutional Descriptor Aggregation", IEEE TIP 2017: the aggregation map A
is the sum over channels of the last convolutional map, after its ReLU. The relaxed rule of "Masking
Improves Contrastive Self-Supervised Learning for ConvNets" (WACV 2024) takes as foreground the
cells with A >= mean(A) - 0.6 std(A), of a view; the map is stored, not the rule's outcome, because
a view's crop has a mean and a spread of its own.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from precompute.estimators.maps import squash, z_scored
from precompute.estimators.options import ScdaOptions
from precompute.estimators.weights import load_weights, sha256_of
from schemas.cli import lookup
from schemas.errors import UserError

# of ImageNet in RGB, on [0, 1]: what torchvision's weights were trained with
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class ScdaEstimator:
    """See `Estimator`.

    Raises:
        UserError: unknown backbone or weights, weights that do not fit or cannot be downloaded, a
            network without a convolutional map.
    """

    def __init__(self, options: ScdaOptions):
        self.options = options
        self.side = options.side
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        known = {name: name for name in torchvision.models.list_models(torchvision.models)}
        torch.manual_seed(0)  # random weights are the same in every worker
        model = torchvision.models.get_model(lookup("backbone", options.backbone, known))
        trunk = last_convolutional_map(model.eval(), options.backbone)
        load_weights(trunk, model, options.backbone, options.weights)
        self.weights_sha256 = sha256_of(trunk.state_dict())
        self.trunk = trunk.requires_grad_(False).to(self.device)
        self.trunk = self.trunk.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(MEAN, device=self.device) * 255
        self.std = torch.tensor(STD, device=self.device) * 255

    @torch.inference_mode()
    def __call__(self, images: Any) -> np.ndarray:
        maps = [z_scored(self.aggregation_map(images, size)) for size in self.options.sizes]
        return torch.stack(maps).mean(dim=0).cpu().numpy()

    def aggregation_map(self, images: Any, size: int) -> torch.Tensor:
        """A at one input size, resampled to the stored side: (N, side, side) float32."""
        pixels = squash(images, size).to(self.device)
        normalised = (pixels.float() - self.mean) / self.std
        inputs = normalised.permute(0, 3, 1, 2)  # NHWC in memory: channels_last, no copy
        reduced = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=reduced):
            activation = self.trunk(inputs)["map"]  # (N, D, U, V)
        aggregation = activation.float().sum(dim=1, keepdim=True)
        side = (self.side, self.side)
        return F.interpolate(aggregation, side, mode="bilinear", antialias=True)[:, 0]


def last_convolutional_map(model: nn.Module, name: str) -> nn.Module:
    """The part of a network up to its last map that still has a height and a width.

    For ResNets that is layer4, for MobileNetV2 `features`, for DenseNets the ReLU after the last
    norm: the last 4-d value with more than one cell, whatever the network calls it.
    """
    probe = torch.zeros(1, 3, 224, 224)
    try:
        _, nodes = get_graph_node_names(model)
        with torch.inference_mode():
            values = create_feature_extractor(model, nodes)(probe)
    except Exception as error:  # torch.fx fails in many ways on what it cannot trace
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
