"""Use timm's ConvNets as backbones of SCDA: `--estimator.backbone timm:convnext_tiny`.

timm is an optional dependency: only users who name one of its networks must install it.
"""

import difflib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import nn

from schemas.errors import UserError

PREFIX = "timm:"
PUBLISHED = "DEFAULT"
"""Selects timm's default weights for a network's name; `name.tag` selects others."""


def is_timm(backbone: str) -> bool:
    return backbone.startswith(PREFIX)


def build_timm_backbone(backbone: str) -> nn.Module:
    """Build a timm network with random weights.

    Raises:
        UserError: timm is not installed or has no such network, or the network is not a ConvNet.
    """
    timm, name = import_timm(backbone), backbone.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        raise UserError(f"backbone {backbone!r}: {hint}timm has no such network")
    model = timm.create_model(name, pretrained=False)
    attention = [type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__]
    if attention:
        raise UserError(
            f"backbone {backbone}: has attention layers ({attention[0]}); choose a ConvNet"
        )
    return model


def download_timm(backbone: str, weights: str) -> Mapping[str, torch.Tensor]:
    """Return the weights that timm publishes, cached or downloaded. Raises UserError."""
    if weights != PUBLISHED:
        raise UserError(
            f"weights {weights!r} of {backbone}: give {PUBLISHED}, random or the path of a file; "
            "timm's other weights have a tag in the name, timm:NAME.TAG"
        )
    timm = import_timm(backbone)
    try:
        model = timm.create_model(backbone.removeprefix(PREFIX), pretrained=True)
    except Exception as error:  # timm uses various clients: requests, httpx, huggingface_hub
        raise UserError(
            f"weights {weights} of {backbone} could not be downloaded ({error}); give a file by "
            "--estimator.weights PATH, or use --estimator spectral, which needs none"
        ) from error
    return model.state_dict()


def import_timm(backbone: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"backbone {backbone}: timm is not installed; pip install timm") from error
    return timm
