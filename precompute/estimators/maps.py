"""Helpers shared by estimators: turn images into tensors, bring maps to one scale."""

from typing import Any

import nvidia.dali.experimental.dynamic as ndd
import torch


def squash(images: Any, size: int) -> torch.Tensor:
    """Resize each image to size x size, ignoring its aspect ratio: (N, size, size, 3) uint8.

    Uses DALI's triangular, antialiased resize, as the training views do.
    """
    resized = ndd.resize(images, size=[size, size])
    return ndd.as_tensor(resized).torch().cpu()


def standardize(maps: torch.Tensor) -> torch.Tensor:
    """Scale each (..., side, side) map to mean 0 and population std 1; constant maps become 0."""
    mean = maps.mean(dim=(-2, -1), keepdim=True)
    std = maps.std(dim=(-2, -1), keepdim=True, correction=0)
    return torch.where(std > 0, (maps - mean) / std, torch.zeros_like(maps))
