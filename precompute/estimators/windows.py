"""Windows over an image, and maps of windows pasted back.

A view shows a network a part of an image, enlarged. A map of parts that are enlarged alike comes
closer to what the network would say of the view than a map of the whole image does.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor

OVERLAP = 3
"""Neighbouring windows are a third of their side apart, or less (ours; see docs/saliency.md)."""

MOST = 8
"""Windows along one axis, for images that are very long: they are longer then."""


CACHED_SHAPES = 4096
"""Shapes of images whose windows and weights are kept, about 15 KB each: photos come in few."""


class Window(NamedTuple):
    """In pixels of an image."""

    top: int
    left: int
    height: int
    width: int


@lru_cache(maxsize=CACHED_SHAPES)
def windows(height: int, width: int, area: float) -> tuple[Window, ...]:
    """Return square windows of this share of the image's area, evenly spread; for 1 all of it.

    A side that would be longer than the image's ends with it.
    """
    side = math.sqrt(area * height * width)
    rows, columns = (spread(length, side) for length in (height, width))
    if area >= 1:
        rows, columns = [(0, height)], [(0, width)]
    return tuple(Window(top, left, h, w) for top, h in rows for left, w in columns)


def spread(length: int, side: float) -> list[tuple[int, int]]:
    """(start, extent) of windows along one axis, the first at its start and the last at its end."""
    if side >= length:
        return [(0, length)]
    count = min(MOST, math.ceil((length - side) / (side / OVERLAP)) + 1)
    extent = max(1, int(side), math.ceil(2 * length / (count + 1)))
    return [(round((length - extent) * k / (count - 1)), extent) for k in range(count)]


def cut(images: Any, places: list[tuple[int, Window]], size: int) -> Tensor:
    """Cut windows and squash each to size x size: (windows, size, size, 3) uint8.

    Args:
        images: a DALI batch. places: which image, and where in it.
    """
    tensors = images.tensors
    corners = np.array([window for _, window in places], np.float32)
    corners[:, 2:] += corners[:, :2]  # top, left, bottom, right
    resized = ndd.resize(
        ndd.as_batch([tensors[index] for index, _ in places]),
        roi_start=ndd.as_batch(np.ascontiguousarray(corners[:, :2])),
        roi_end=ndd.as_batch(np.ascontiguousarray(corners[:, 2:])),
        size=[size, size],
    )
    return ndd.as_tensor(resized).torch()


def paste(maps: Tensor, shapes: list[tuple[int, int]], area: float, side: int) -> Tensor:
    """Paste maps of windows into one map for each image, their mean where windows overlap.

    Args:
        maps: (windows, u, v) float32, of the images' `windows` of this area, in order.
        shapes: (height, width) of the images.

    Returns:
        (images, side, side) float32.
    """
    parts = [weights(*shape, area, side, *maps.shape[1:]) for shape in shapes]
    y = torch.cat([part.y for part in parts])
    x = torch.cat([part.x for part in parts])
    index = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p.y) for p in parts]))
    total = torch.zeros(len(shapes), side, side)
    total.index_add_(0, index, y @ maps @ x.transpose(1, 2))
    return total / torch.stack([part.cover for part in parts])


class Weights(NamedTuple):
    """How the cells of an image's map read the cells of its windows' maps.

    y: (windows, side, u), x: (windows, side, v) float32, bilinear weights along each axis.
    cover: (side, side) float32, how many windows lie over a cell.
    """

    y: Tensor
    x: Tensor
    cover: Tensor


@lru_cache(maxsize=CACHED_SHAPES)
def weights(height: int, width: int, area: float, side: int, u: int, v: int) -> Weights:
    """Return the weights of all windows of one area over an image of this shape."""
    found = windows(height, width, area)
    y, inside_y = axis([(w.top, w.height, height) for w in found], side, u)
    x, inside_x = axis([(w.left, w.width, width) for w in found], side, v)
    return Weights(y, x, (inside_y.unsqueeze(2) * inside_x.unsqueeze(1)).sum(dim=0))


def axis(extents: list[tuple[int, int, int]], side: int, cells: int) -> tuple[Tensor, Tensor]:
    """How the middles of an image's cells read a window's cells, bilinearly.

    Args:
        extents: start and extent of each window and length of its image, in pixels.

    Returns:
        (windows, side, cells) float32 weights, zero outside of the window, and (windows, side)
        float32, 1 inside and 0 outside.
    """
    start, extent, length = (column.unsqueeze(1) for column in torch.tensor(extents).double().T)
    points = (torch.arange(side) + 0.5) / side
    place = (points * length - start) / extent
    # a window narrower than a cell holds the point that is nearest to its middle
    nearest = ((start + extent / 2) / length * side).long().clamp(max=side - 1)
    inside = (place >= 0) & (place <= 1) | (torch.arange(side) == nearest)
    position = (place * cells - 0.5).clamp(0, cells - 1)
    distance = (position.unsqueeze(2) - torch.arange(cells)).abs()
    weights = (1 - distance).clamp(min=0) * inside.unsqueeze(2)
    return weights.float(), inside.float()
