"""ConvNets of timm as encoders, for example `timm:convnext_tiny`.

timm takes seconds to import, so it is imported only when such a name is given.
"""

from typing import Any

import torch
from torch import Tensor, nn

from schemas import UserError
from schemas.timm_networks import build_convnet

STRIDE = 32
"""Required stride of the last map, as in a ResNet: one cell of the mask grid at 224 pixels."""
PROBE = 64
"""Side in pixels of the image on which a network is tried: two cells."""


def is_known_to_timm(name: str) -> bool:
    """Return whether timm has a network of this name, which has no prefix."""
    import timm

    return bool(timm.is_model(name))


def build_timm_encoder(name: str) -> tuple[nn.Module, int]:
    """Build a randomly initialized network (N, 3, H, W) -> (N, D) pooled features; return it and D.

    Its state_dict has timm's key names without a classifier. Weights come from torch's global RNG.

    Args:
        name: `timm:` and a model name of timm.

    Raises:
        UserError: timm has no such network, it is not a ConvNet, or its last map is not at stride
            32.
    """
    encoder = build_convnet("encoder", name, num_classes=0)
    was_training = encoder.training
    encoder.eval()
    image = torch.zeros(1, 3, PROBE, PROBE)
    try:
        with torch.no_grad():
            maps, pooled = encoder.forward_features(image), encoder(image)
    except (AssertionError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"encoder {name}: does not take images of {PROBE} pixels ({error}); choose a ConvNet "
            "that takes any size"
        ) from error
    encoder.train(was_training)
    cells = PROBE // STRIDE
    if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[2:] != (cells, cells):
        shape = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise UserError(
            f"encoder {name}: has no map at stride {STRIDE}: from {PROBE} pixels it makes {shape}, "
            f"not (1, D, {cells}, {cells})"
        )
    return encoder, pooled.shape[1]


def has_parameters_after_map(encoder: nn.Module) -> bool:
    """Return True if the last map does not depend on some parameters, as on ConvNeXt's head.norm.

    `encoder` is a network of `build_timm_encoder` on the CPU.
    """
    network: Any = encoder
    was_training = encoder.training
    encoder.eval()  # running statistics stay
    maps = network.forward_features(torch.zeros(1, 3, PROBE, PROBE))
    encoder.train(was_training)
    gradients = torch.autograd.grad(maps.sum(), list(encoder.parameters()), allow_unused=True)
    return any(gradient is None for gradient in gradients)


def is_timm_encoder(module: nn.Module) -> bool:
    """Return True for a whole network of `build_timm_encoder`, False for a part of one."""
    return hasattr(module, "forward_features") and hasattr(module, "reset_classifier")
