"""Regions: boxes of an image that both of its views show, in the coordinates of each view.

A region lies in the overlap of the two crop windows. Each of its sides is a random fraction of the
overlap's side, and at least one grid cell in both views. If the overlap is too small for that, the
sample has no region: the box is the entire view, `valid` is False and nothing is masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.devices import to_device
from pipeline.masks import Masks
from pipeline.recipes import Recipe
from pipeline.rng import Rng


@dataclass(frozen=True)
class Regions:
    """The regions of a batch.

    Attributes:
        query, key: (N, R, 4) float32 on the device, x0 y0 x1 y1 in pixels of the view.
        valid: (N, R) bool on the device, False for samples without a region.
    """

    query: Tensor
    key: Tensor
    valid: Tensor

    def to_masks(self, side: int) -> Masks:
        """Return masks that fill each pixel of the query whose center is in a valid region."""
        center = torch.arange(side, device=self.query.device) + 0.5
        x0, y0, x1, y1 = self.query.unsqueeze(-1).unbind(2)  # (N, R, 1) each
        columns = (center >= x0) & (center < x1)  # (N, R, side)
        rows = (center >= y0) & (center < y1)
        inside = rows.unsqueeze(3) & columns.unsqueeze(2) & self.valid[..., None, None]
        filled = inside.any(1, keepdim=True)
        ratio = filled.double().mean(dim=(1, 2, 3))
        return Masks(filled, None, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def draw_regions(
    query: Tensor, key: Tensor, saliency: Tensor | None, recipe: Recipe, rng: Rng
) -> Regions:
    """Draw the regions of a batch.

    Args:
        query, key: (N, 4) float32 on the CPU, windows as y0 x0 y1 x1, in fractions of the image;
            x0 > x1 if flipped.
        saliency: (N, grid, grid) of the query view; needed only for salient regions.
    """
    size, count = len(query), recipe.regions
    is_salient = recipe.region_choice == "salient"
    candidates = recipe.region_candidates if is_salient else 1
    windows = to_device(torch.stack([query, key]).double(), rng.device)  # (2, N, 4)
    start = torch.minimum(windows[..., :2], windows[..., 2:])  # (2, N, 2) as y, x
    end = torch.maximum(windows[..., :2], windows[..., 2:])
    low, high = start.amax(0), end.amin(0)  # bounds of the overlap, (N, 2)
    extent = high - low
    smallest = (end - start).amax(0) / recipe.grid  # one cell of the wider view
    valid = (smallest <= extent).all(1)  # (N,)

    shortest, longest = recipe.region_extent
    fraction = shortest + (longest - shortest) * rng.uniform(size, count, candidates, 2)
    sides = torch.maximum(fraction * extent[:, None, None], smallest[:, None, None])
    position = rng.uniform(size, count, candidates, 2)
    first = low[:, None, None] + position * (extent[:, None, None] - sides)
    boxes = torch.cat([first, first + sides], dim=-1)  # (N, R, candidates, 4) as y0 x0 y1 x1
    if is_salient:
        assert saliency is not None
        best = average_saliency(map_to_view(boxes, windows[0], 1.0), saliency.double()).argmax(2)
        boxes = boxes.take_along_dim(best[..., None, None], dim=2)
    boxes = boxes[:, :, 0]

    valid = valid[:, None].expand(-1, count)
    side = float(recipe.crop_size)
    # computed on the device, so that the host need not wait
    is_end = torch.arange(4, device=windows.device) >= 2
    entire_view = side * is_end.to(windows.dtype)
    boxes_in_views = [
        torch.where(valid[..., None], map_to_view(boxes, window, side), entire_view).float()
        for window in windows
    ]
    return Regions(boxes_in_views[0], boxes_in_views[1], valid)


def map_to_view(boxes: Tensor, window: Tensor, side: float) -> Tensor:
    """Map boxes of the image into a view of `side` pixels.

    Args:
        boxes: (N, ..., 4) y0 x0 y1 x1 as fractions of the image.
        window: (N, 4) y0 x0 y1 x1 as fractions of the image; x0 > x1 if flipped.

    Returns:
        (N, ..., 4) x0 y0 x1 y1 with x0 < x1 and y0 < y1.
    """
    window = window.view(len(window), *[1] * (boxes.ndim - 2), 4)
    y0, x0, y1, x1 = window.unbind(-1)
    top, left, bottom, right = boxes.unbind(-1)
    across = [side * (x - x0) / (x1 - x0) for x in (left, right)]
    down = [side * (y - y0) / (y1 - y0) for y in (top, bottom)]
    return torch.stack([torch.minimum(*across), down[0], torch.maximum(*across), down[1]], dim=-1)


def average_saliency(boxes: Tensor, saliency: Tensor) -> Tensor:
    """Average the saliency inside boxes of a view.

    Args:
        boxes: (N, R, T, 4) x0 y0 x1 y1 as fractions of the view. saliency: (N, grid, grid).

    Returns:
        (N, R, T); each cell is weighted by the area that the box covers.
    """
    grid = saliency.shape[1]
    edge = torch.arange(grid, dtype=torch.float64, device=boxes.device) / grid

    def measure_cover(first: Tensor, last: Tensor) -> Tensor:
        """Return the covered length of each cell along an axis: (N, R, T, grid)."""
        end = torch.minimum(last[..., None], edge + 1 / grid)
        return (end - torch.maximum(first[..., None], edge)).clamp(min=0)

    x0, y0, x1, y1 = boxes.unbind(-1)
    weight = measure_cover(y0, y1)[..., :, None] * measure_cover(x0, x1)[..., None, :]
    total = (weight * saliency[:, None, None]).sum(dim=(-2, -1))
    return total / weight.sum(dim=(-2, -1)).clamp(min=1e-12)
