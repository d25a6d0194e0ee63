"""What estimators share: images to tensors, maps to one scale."""

from typing import Any

import nvidia.dali.experimental.dynamic as ndd
import torch


def squash(images: Any, size: int) -> torch.Tensor:
    """Resize each image to size x size, whatever its aspect ratio: (N, size, size, 3) uint8.

    DALI's resize, triangular and antialiased, as the views' own resize is.
    """
    resized = ndd.resize(images, size=[size, size])
    return ndd.as_tensor(resized).torch().cpu()


def z_scored(maps: torch.Tensor) -> torch.Tensor:
    """Each (..., side, side) map minus its mean, over its population std; a constant map is 0."""
    mean = maps.mean(dim=(-2, -1), keepdim=True)
    std = maps.std(dim=(-2, -1), keepdim=True, correction=0)
    return torch.where(std > 0, (maps - mean) / std, torch.zeros_like(maps))
