"""Choose the masked pixels of a view: saliency -> foreground -> counts -> cells, or a focal window.

Everything is a tensor operation on the batch: there are no Python loops over samples or cells, no
sorting, and the host does not wait for the device. Relation to the released code (docs/method.md,
D1, D2 and D10 to D13):

* D1: a cell is compared with the threshold in its own place (the released code sorts rows first).
* D2: each sample's hard negative is made from its own key (released: from one image per batch).
* D10: only `hp` has the cap, as released.
* D11: focal windows ignore saliency, as released and as in the poster's figure.
* D12: the background count is never negative (released: if it is, all but one cell are masked).
* D13: a group of one cell can be masked (released: it never is).

A custom mask is one function: docs/pipeline.md has an example.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.compiling import compile_on_gpu
from pipeline.recipes import Recipe
from pipeline.registry import find, register
from pipeline.rng import Rng
from schemas import UserError

Role = Literal["query", "hard_negative"]

Mask = Callable[[Tensor, Tensor, Recipe, Rng], Tensor]
"""Signature of a mask: (saliency, ratio, recipe, rng) -> (N, h, w) bool, True where filled.

h and w divide the crop. saliency: (N, grid, grid) float32 of the views, at any scale. ratio: (N,)
float64, the drawn mask ratios. rng: source of all randomness, so that a mask depends on its sample
only. For channel-wise masks each view is passed three times in a row. A user's mask may change
saliency and ratio, which are copies, in place.
"""

MASKS: dict[str, Mask] = {}
mask = partial(register, "mask", registry=MASKS)
"""The decorator `@mask("name")` registers a function as a mask that a recipe can name."""

BLOCK_ASPECT = (0.3, 3.3)
"""Range of a block's height over width (block masks of the ADIOS paper; log-uniform is ours)."""


@compile_on_gpu
def find_foreground(saliency: Tensor, margin: float) -> Tensor:
    """Find the foreground by relaxed SCDA: A >= mean - margin * std.

    Mean and population standard deviation are the view's own.

    Args:
        saliency: (N, G, G), any scale.

    Returns:
        (N, G, G) bool; all True if the saliency is constant.
    """
    cells = saliency.double().flatten(1)  # float64: the mean of equal values is exact
    deviation, mean = torch.std_mean(cells, dim=1, correction=0, keepdim=True)
    return (cells >= mean - margin * deviation).view(saliency.shape)


@compile_on_gpu
def pick_cells(group: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """Pick `count` cells of each group uniformly, without replacement.

    Every cell has a uniform score; cells whose rank in their group is below the count are picked.

    Args:
        group: (N, C) bool. count: (N,) integer; a count above the group's size picks all of it.
        score: (N, C) float64 in 0 .. 1 (float32 has so few values that two of them would tie).

    Returns:
        (N, C) bool.
    """
    score = score.masked_fill(~group, 2.0)
    rank = (score.unsqueeze(-2) < score.unsqueeze(-1)).sum(-1)
    return group & (rank < count.unsqueeze(1))


@compile_on_gpu
def count_masked_foreground(ratio: Tensor, front: Tensor, recipe: Recipe) -> Tensor:
    """Return round(ratio * foreground share * cells), ties to even, under the recipe's cap.

    Args:
        ratio: (N,) float64. front: (N, cells) bool.
    """
    share = ratio * front.sum(1) / front.shape[1]
    if recipe.foreground_cap is not None:
        limit, value = recipe.foreground_cap
        share = torch.where(share >= limit, value, share)
    return (share * front.shape[1]).round().long()


@mask("spread")
def mask_evenly(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask floor(ratio * cells), with equal shares of foreground and background (the method's)."""
    front = find_foreground(saliency, recipe.foreground_margin).flatten(1)
    front_count = count_masked_foreground(ratio, front, recipe)
    back_count = ((ratio * front.shape[1]).floor().long() - front_count).clamp(min=0)
    score = rng.uniform(*front.shape)
    picked = pick_cells(front, front_count, score) | pick_cells(~front, back_count, score)
    return picked.view(saliency.shape)


@mask("foreground")
def mask_foreground(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask this ratio of the foreground cells, under the cap (the method's hard negative)."""
    front = find_foreground(saliency, recipe.foreground_margin).flatten(1)
    count = count_masked_foreground(ratio, front, recipe)
    return pick_cells(front, count, rng.uniform(*front.shape)).view(saliency.shape)


@mask("background")
def mask_background(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask this ratio of the background cells, ties rounded to even."""
    back = ~find_foreground(saliency, recipe.foreground_margin).flatten(1)
    count = (ratio * back.sum(1)).round().long()
    return pick_cells(back, count, rng.uniform(*back.shape)).view(saliency.shape)


@mask("random")
def mask_at_random(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask floor(ratio * cells) cells, whatever the saliency."""
    cells = torch.ones_like(saliency, dtype=torch.bool).flatten(1)
    count = (ratio * cells.shape[1]).floor().long()
    return pick_cells(cells, count, rng.uniform(*cells.shape)).view(saliency.shape)


@mask("block")
def mask_block(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask a rectangle of about this share of the view, whatever the saliency.

    It is smaller if its longer side would exceed the view.
    """
    low, high = torch.tensor(BLOCK_ASPECT, dtype=torch.float64).log().tolist()
    aspect = (low + (high - low) * rng.uniform(len(ratio))).exp()
    side = recipe.crop_size
    height = (side * (ratio * aspect).sqrt()).round().clamp(max=side)
    width = (side * (ratio / aspect).sqrt()).round().clamp(max=side)
    return intersect(*place_rectangle(height, width, side, rng.uniform(len(ratio), 2)))


BUILT_IN_MASKS = frozenset(MASKS)
"""Masks that do not change their arguments."""


@compile_on_gpu
def place_rectangle(
    height: Tensor, width: Tensor, side: int, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Place a rectangle in each view of `side` pixels; all positions are equally likely.

    Args:
        height, width: (N,) integers up to `side`, of any dtype. position: (N, 2) uniform in 0 .. 1.

    Returns:
        Its rows and its columns, (N, side) bool each.
    """
    axis = torch.arange(side, device=position.device)

    def is_inside(extent: Tensor, fraction: Tensor) -> Tensor:
        start = (fraction * (side - extent + 1)).floor().unsqueeze(1)
        return (axis >= start) & (axis < start + extent.unsqueeze(1))

    return is_inside(height, position[:, 0]), is_inside(width, position[:, 1])


def intersect(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the pixels of rectangles, (N, side, side) bool, from their rows and columns."""
    if rows.device.type == "cpu":  # PyTorch's `&` of bool tensors takes 20 times as long there
        rows, columns = rows.view(torch.uint8), columns.view(torch.uint8)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).view(torch.bool)


class Windows(NamedTuple):
    """The focal windows of N views.

    Attributes:
        rows, columns: (N, crop) bool, the rows and the columns of each focal window.
        is_kept: True if the pixels around the window are filled, False if those inside are.
    """

    rows: Tensor
    columns: Tensor
    is_kept: bool

    def select(self, rows: slice) -> "Windows":
        """Return the windows of these views."""
        return Windows(self.rows[rows], self.columns[rows], self.is_kept)

    def to_pixels(self) -> Tensor:
        """Return (N, crop, crop) bool, True where filled."""
        inside = intersect(self.rows, self.columns)
        return ~inside if self.is_kept else inside


@dataclass(frozen=True)
class Masks:
    """The masks of a batch of views.

    Attributes:
        cells: (N, C, h, w) bool, C is 1 or 3, True where filled; h and w divide the crop.
        windows: focal windows; None if the recipe has none.
        ratio: (N,) float64, the drawn mask ratio; for `regions`, the share of the view that is
            filled.
        focal: (N,) bool, True if the window applies instead of the cells.
    """

    cells: Tensor
    windows: Windows | None
    ratio: Tensor
    focal: Tensor

    @classmethod
    def concatenate(cls, masks: Sequence["Masks"]) -> "Masks":
        """Concatenate the masks of several batches that share a recipe and a role."""
        parts = [part.windows for part in masks if part.windows is not None]
        windows = None
        if parts:
            rows, columns = (torch.cat(axis) for axis in zip(*(p[:2] for p in parts), strict=True))
            windows = Windows(rows, columns, parts[0].is_kept)
        return cls(
            torch.cat([part.cells for part in masks]),
            windows,
            torch.cat([part.ratio for part in masks]),
            torch.cat([part.focal for part in masks]),
        )

    def select(self, rows: slice) -> "Masks":
        """Return the masks of these rows."""
        windows = None if self.windows is None else self.windows.select(rows)
        return Masks(self.cells[rows], windows, self.ratio[rows], self.focal[rows])

    def to_pixels(self, side: int) -> Tensor:
        """Return the masks as (N, C, side, side) float32, 1 where filled and 0 elsewhere."""
        cells = self.cells.float()
        pixels = cells.repeat_interleave(side // cells.shape[3], 3)
        pixels = pixels.repeat_interleave(side // cells.shape[2], 2)
        if self.windows is not None:
            window = self.windows.to_pixels().unsqueeze(1).float()
            pixels = torch.lerp(pixels, window, self.focal.float().view(-1, 1, 1, 1))
        return pixels


def check_cells(cells: Tensor, name: str, rows: int, recipe: Recipe) -> Tensor:
    """Return the cells that a mask returned, as bool. Raises UserError if their shape is wrong."""
    side = recipe.crop_size
    is_valid = cells.ndim == 3 and len(cells) == rows and min(cells.shape) > 0
    if not is_valid or side % cells.shape[1] or side % cells.shape[2]:
        raise UserError(
            f"mask {name!r}: it returned cells of shape {tuple(cells.shape)}; a mask returns "
            f"({rows}, h, w), where h and w divide the view of {side} pixels"
        )
    return cells.bool()


def draw_masks(saliency: Tensor, recipe: Recipe, role: Role, rng: Rng) -> Masks:
    """Draw the masks of a batch of views.

    Args:
        saliency: (N, G, G) float32 of the views.
        role: selects the mask and the ratio of the recipe. A focal window is kept in a `query` and
            filled in a `hard_negative`.
    """
    size = len(saliency)
    low, high = recipe.query_ratio if role == "query" else recipe.hard_negative_ratio
    ratio = low + (high - low) * rng.uniform(size)
    name = getattr(recipe, f"{role}_mask")
    function = find("mask", name, MASKS)
    if recipe.channel_probability > 0:
        saliencies, ratios = saliency.repeat_interleave(3, 0), ratio.repeat_interleave(3)
        drawn = function(saliencies, ratios, recipe, rng)
        cells = check_cells(drawn, name, 3 * size, recipe).unflatten(0, (size, 3))
        by_channel = rng.uniform(size, 1, 1, 1) < recipe.channel_probability
        cells = torch.where(by_channel, cells, cells[:, :1])
    else:
        saliencies, ratios = saliency, ratio
        if name not in BUILT_IN_MASKS:
            saliencies, ratios = saliency.clone(), ratio.clone()
        drawn = function(saliencies, ratios, recipe, rng)
        cells = check_cells(drawn, name, size, recipe).unsqueeze(1)

    focal, windows = torch.zeros_like(ratio, dtype=torch.bool), None
    if recipe.focal_probability > 0:
        focal = rng.uniform(size) < recipe.focal_probability
        keeps_window = role == "query"
        side = recipe.focal_side(recipe.focal_kept if keeps_window else recipe.focal_filled)
        extent = torch.full_like(ratio, side)
        axes = place_rectangle(extent, extent, recipe.crop_size, rng.uniform(size, 2))
        windows = Windows(*axes, keeps_window)
    return Masks(cells, windows, ratio, focal)
