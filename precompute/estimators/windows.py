"""Windows over an image, and maps of windows pasted back.

A view shows a network a part of an image, enlarged. A map of parts that are enlarged alike comes
closer to what the network would say of the view than a map of the whole image does.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor

OVERLAP = 3
"""Neighbouring windows are a third of their side apart, or less (ours; see docs/precompute.md)."""

MOST = 8
"""Windows along one axis, for images that are very long: they are longer then."""


class Window(NamedTuple):
    """In pixels of an image."""

    top: int
    left: int
    height: int
    width: int


def windows(height: int, width: int, area: float) -> list[Window]:
    """Square windows of this share of the image's area, evenly spread; the whole image for 1.

    A side that would be longer than the image's ends with it.
    """
    side = math.sqrt(area * height * width)
    rows, columns = (spread(length, side) for length in (height, width))
    if area >= 1:
        rows, columns = [(0, height)], [(0, width)]
    return [Window(top, left, h, w) for top, h in rows for left, w in columns]


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
    starts = [np.array([w.top, w.left], np.float32) for _, w in places]
    ends = [np.array([w.top + w.height, w.left + w.width], np.float32) for _, w in places]
    resized = ndd.resize(
        ndd.as_batch([tensors[index] for index, _ in places]),
        roi_start=ndd.as_batch(starts),
        roi_end=ndd.as_batch(ends),
        size=[size, size],
    )
    return ndd.as_tensor(resized).torch()


def paste(
    maps: Tensor, places: list[tuple[int, Window]], shapes: list[tuple[int, int]], side: int
) -> Tensor:
    """Maps of windows -> one map an image, their mean where windows overlap.

    Args:
        maps: (windows, u, v) float32. places: of each. shapes: (height, width) of the images.

    Returns:
        (images, side, side) float32.
    """
    y, inside_y = axis([(w.top, w.height, shapes[i][0]) for i, w in places], side, maps.shape[1])
    x, inside_x = axis([(w.left, w.width, shapes[i][1]) for i, w in places], side, maps.shape[2])
    index = torch.tensor([i for i, _ in places])
    total = torch.zeros(len(shapes), side, side)
    cover = torch.zeros(len(shapes), side, side)
    total.index_add_(0, index, y @ maps @ x.transpose(1, 2))
    cover.index_add_(0, index, inside_y.unsqueeze(2) * inside_x.unsqueeze(1))
    return total / cover


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
