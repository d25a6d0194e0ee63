"""Regions: boxes in image coordinates that both views of an image show, mapped into each view.

A region lies in the overlap of the two windows. Each of its sides is a drawn share of the
overlap's, and at least one cell of the grid in both views; where the overlap is too small for that,
the sample has no region: the box is the whole view, `valid` is False and nothing is masked.
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
    """What was drawn for a batch.

    Attributes:
        query, key: (N, R, 4) float32 on the device, x0 y0 x1 y1 in pixels of the view.
        valid: (N, R) bool on the device.
    """

    query: Tensor
    key: Tensor
    valid: Tensor

    def masks(self, side: int) -> Masks:
        """The valid regions of the query as masks: a pixel is filled if its centre lies inside."""
        centre = torch.arange(side, device=self.query.device) + 0.5
        x0, y0, x1, y1 = self.query.unsqueeze(-1).unbind(2)  # (N, R, 1) each
        columns = (centre >= x0) & (centre < x1)  # (N, R, side)
        rows = (centre >= y0) & (centre < y1)
        inside = rows.unsqueeze(3) & columns.unsqueeze(2) & self.valid[..., None, None]
        filled = inside.any(1, keepdim=True)
        ratio = filled.double().mean(dim=(1, 2, 3))
        return Masks(filled, None, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def draw(query: Tensor, key: Tensor, saliency: Tensor | None, recipe: Recipe, rng: Rng) -> Regions:
    """Draw the regions of a batch.

    Args:
        query, key: (N, 4) float32 on the CPU, y0 x0 y1 x1 of the windows as shares of the image;
            x0 > x1 when flipped.
        saliency: (N, grid, grid) of the query view; looked at for salient regions.
    """
    size, count = len(query), recipe.regions
    salient = recipe.region_choice == "salient"
    tries = recipe.region_candidates if salient else 1
    windows = to_device(torch.stack([query, key]).double(), rng.device)  # (2, N, 4)
    start = torch.minimum(windows[..., :2], windows[..., 2:])  # (2, N, 2) as y, x
    end = torch.maximum(windows[..., :2], windows[..., 2:])
    low, high = start.amax(0), end.amin(0)  # of the overlap, (N, 2)
    extent = high - low
    least = (end - start).amax(0) / recipe.grid  # one cell in the view that shows more
    valid = (least <= extent).all(1)  # (N,)

    shortest, longest = recipe.region_extent
    share = shortest + (longest - shortest) * rng.uniform(size, count, tries, 2)
    sides = torch.maximum(share * extent[:, None, None], least[:, None, None])
    place = rng.uniform(size, count, tries, 2)
    first = low[:, None, None] + place * (extent[:, None, None] - sides)
    boxes = torch.cat([first, first + sides], dim=-1)  # (N, R, tries, 4) as y0 x0 y1 x1
    if salient:
        assert saliency is not None
        best = salience(in_view(boxes, windows[0], 1.0), saliency.double()).argmax(2)
        boxes = boxes.take_along_dim(best[..., None, None], dim=2)
    boxes = boxes[:, :, 0]

    valid = valid[:, None].expand(-1, count)
    side = float(recipe.crop_size)
    whole = side * (torch.arange(4, device=windows.device) >= 2).to(windows.dtype)  # no host wait
    found = [
        torch.where(valid[..., None], in_view(boxes, window, side), whole).float()
        for window in windows
    ]
    return Regions(found[0], found[1], valid)


def in_view(boxes: Tensor, window: Tensor, side: float) -> Tensor:
    """Boxes of the image in a view of `side` pixels.

    Args:
        boxes: (N, ..., 4) y0 x0 y1 x1 as shares of the image.
        window: (N, 4) y0 x0 y1 x1; x0 > x1 when flipped.

    Returns:
        (N, ..., 4) x0 y0 x1 y1 with x0 < x1 and y0 < y1.
    """
    window = window.view(len(window), *[1] * (boxes.ndim - 2), 4)
    y0, x0, y1, x1 = window.unbind(-1)
    top, left, bottom, right = boxes.unbind(-1)
    across = [side * (x - x0) / (x1 - x0) for x in (left, right)]
    down = [side * (y - y0) / (y1 - y0) for y in (top, bottom)]
    return torch.stack([torch.minimum(*across), down[0], torch.maximum(*across), down[1]], dim=-1)


def salience(boxes: Tensor, saliency: Tensor) -> Tensor:
    """Mean saliency inside boxes of a view.

    Args:
        boxes: (N, R, T, 4) x0 y0 x1 y1 in 0 .. 1 of the view. saliency: (N, grid, grid).

    Returns:
        (N, R, T); a cell counts as much as the box covers it.
    """
    grid = saliency.shape[1]
    edge = torch.arange(grid, dtype=torch.float64, device=boxes.device) / grid

    def covered(first: Tensor, last: Tensor) -> Tensor:
        """Of each cell along an axis: (N, R, T, grid)."""
        end = torch.minimum(last[..., None], edge + 1 / grid)
        return (end - torch.maximum(first[..., None], edge)).clamp(min=0)

    x0, y0, x1, y1 = boxes.unbind(-1)
    weight = covered(y0, y1)[..., :, None] * covered(x0, x1)[..., None, :]
    total = (weight * saliency[:, None, None]).sum(dim=(-2, -1))
    return total / weight.sum(dim=(-2, -1)).clamp(min=1e-12)
