"""Cut an image into windows, and paste the windows' maps back into a map of the image.

A training view shows the network an enlarged part of an image. A map made of similarly enlarged
windows is closer to the map of a view than the map of the whole image is.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor

OVERLAP = 3
"""Neighboring windows are at most a third of their side apart (our choice: docs/saliency.md)."""

MAX_WINDOWS = 8
"""Maximum number of windows along one axis; in very long images, windows are longer instead."""


CACHED_SHAPES = 4096
"""Number of image shapes whose windows and weights are cached, at about 15 KB each; most photos
share few shapes."""


class Window(NamedTuple):
    """A rectangle in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@lru_cache(maxsize=CACHED_SHAPES)
def list_windows(height: int, width: int, area: float) -> tuple[Window, ...]:
    """Return evenly spread square windows that each have this fraction of the image's area.

    For an area of 1, the only window is the whole image. A side that would be longer than the
    image's is cut to it.
    """
    side = math.sqrt(area * height * width)
    rows, columns = (spread(length, side) for length in (height, width))
    if area >= 1:
        rows, columns = [(0, height)], [(0, width)]
    return tuple(Window(top, left, h, w) for top, h in rows for left, w in columns)


def spread(length: int, side: float) -> list[tuple[int, int]]:
    """Return the (start, extent) of windows that cover one axis from its start to its end."""
    if side >= length:
        return [(0, length)]
    count = min(MAX_WINDOWS, math.ceil((length - side) / (side / OVERLAP)) + 1)
    extent = max(1, int(side), math.ceil(2 * length / (count + 1)))
    return [(round((length - extent) * k / (count - 1)), extent) for k in range(count)]


def cut(images: Any, places: list[tuple[int, Window]], size: int) -> Tensor:
    """Cut out windows and resize each to size x size: (windows, size, size, 3) uint8.

    Args:
        images: a DALI batch.
        places: for each window, the index of its image and the window in that image.
    """
    corners = np.array([window for _, window in places], np.float32)
    corners[:, 2:] += corners[:, :2]  # top, left, bottom, right
    resized = ndd.resize(
        repeat_images(images, [index for index, _ in places]),
        roi_start=ndd.as_batch(np.ascontiguousarray(corners[:, :2])),
        roi_end=ndd.as_batch(np.ascontiguousarray(corners[:, 2:])),
        size=[size, size],
    )
    return ndd.as_tensor(resized).torch()


def repeat_images(images: Any, indices: list[int]) -> Any:
    """Return a DALI batch of the images with these indices, any of them repeated, without a copy.

    `ndd.as_batch` of a list of DALI's tensors does the same, but takes 6 microseconds for each in
    Python. DALI has no public name for the list of C++ tensors that it makes of them in the end.
    """
    storage = images.evaluate()._storage
    with images.device:
        chosen = [storage[index] for index in indices]
        return ndd.as_batch(type(storage)(chosen, images.layout, contiguous=False))


def paste(maps: Tensor, shapes: list[tuple[int, int]], area: float, side: int) -> Tensor:
    """Combine the maps of windows into one map per image, averaging where windows overlap.

    Args:
        maps: (windows, u, v) float32 maps of the images' `windows` of this area, in order.
        shapes: (height, width) of each image.

    Returns:
        (images, side, side) float32.
    """
    parts = [compute_weights(*shape, area, side, *maps.shape[1:]) for shape in shapes]
    y = torch.cat([part.y for part in parts])
    x = torch.cat([part.x for part in parts])
    index = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p.y) for p in parts]))
    total = torch.zeros(len(shapes), side, side)
    total.index_add_(0, index, y @ maps @ x.transpose(1, 2))
    return total / torch.stack([part.cover for part in parts])


class Weights(NamedTuple):
    """Weights that resample the maps of an image's windows into the map of the image.

    Attributes:
        y: (windows, side, u) float32, bilinear weights along the vertical axis.
        x: (windows, side, v) float32, bilinear weights along the horizontal axis.
        cover: (side, side) float32, number of windows that cover each cell.
    """

    y: Tensor
    x: Tensor
    cover: Tensor


@lru_cache(maxsize=CACHED_SHAPES)
def compute_weights(height: int, width: int, area: float, side: int, u: int, v: int) -> Weights:
    """Return the resampling weights of all windows of one area in an image of this shape."""
    all_windows = list_windows(height, width, area)
    y, inside_y = compute_axis_weights([(w.top, w.height, height) for w in all_windows], side, u)
    x, inside_x = compute_axis_weights([(w.left, w.width, width) for w in all_windows], side, v)
    return Weights(y, x, (inside_y.unsqueeze(2) * inside_x.unsqueeze(1)).sum(dim=0))


def compute_axis_weights(
    extents: list[tuple[int, int, int]], side: int, cells: int
) -> tuple[Tensor, Tensor]:
    """Return bilinear weights from each window's cells to the image's cell centers, along one axis.

    Args:
        extents: start and extent of each window and length of its image, in pixels.

    Returns:
        (windows, side, cells) float32 weights, zero outside of the window, and (windows, side)
        float32, 1 inside and 0 outside.
    """
    start, extent, length = (column.unsqueeze(1) for column in torch.tensor(extents).double().T)
    points = (torch.arange(side) + 0.5) / side
    place = (points * length - start) / extent
    # a window narrower than a cell counts for the cell center nearest to the window's middle
    nearest = ((start + extent / 2) / length * side).long().clamp(max=side - 1)
    inside = (place >= 0) & (place <= 1) | (torch.arange(side) == nearest)
    position = (place * cells - 0.5).clamp(0, cells - 1)
    distance = (position.unsqueeze(2) - torch.arange(cells)).abs()
    weights = (1 - distance).clamp(min=0) * inside.unsqueeze(2)
    return weights.float(), inside.float()
