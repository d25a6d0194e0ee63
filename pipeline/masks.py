"""Where a view is masked: saliency -> foreground -> counts -> cells, or a window.

Everything is a tensor operation on the batch: no Python loop over samples or cells, no sort, no
wait for the device. Against the released code (methods table D1, D2, D10-D13), decided once here:

* D1 the foreground stays where the saliency is (the release sorts each row before thresholding);
* D2 each sample's hard negative is made of its own key (the release picks one image of the batch);
* D10 the cap belongs to `hp` alone, as released;
* D11 focal windows ignore saliency, as released and as in the poster's figure;
* D12 a background count is never negative (the release then masks all but one cell);
* D13 a group of a single cell can be masked (the release drops it).

A mask of your own is one function: docs/pipeline.md has an example.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pipeline.compiling import compile_on_gpu
from pipeline.recipes import Recipe
from pipeline.registry import find, register
from pipeline.rng import Rng

Role = Literal["query", "hard_negative"]

Mask = Callable[[Tensor, Tensor, Recipe, Rng], Tensor]
"""(saliency, ratio, recipe, rng) -> (N, h, w) bool, True where filled; h and w divide the crop.

saliency: (N, grid, grid) float32, each view's own, any scale. ratio: (N,) float64, the drawn mask
ratio. rng: for all randomness, so that a mask depends on its sample alone. For channel-wise masks
a view comes three times in a row.
"""

MASKS: dict[str, Mask] = {}
mask = partial(register, "mask", registry=MASKS)
"""`@mask("name")` makes a function a mask that a recipe can name."""

BLOCK_ASPECT = (0.3, 3.3)
"""Height over width of a block (the block masks among ADIOS's controls; log-uniform is ours)."""


@compile_on_gpu
def foreground(saliency: Tensor, margin: float) -> Tensor:
    """Relaxed SCDA: A >= mean - margin * std, with the view's own mean and population std.

    Args:
        saliency: (N, G, G), any scale.

    Returns:
        (N, G, G) bool; all True where the saliency is constant.
    """
    cells = saliency.double().flatten(1)  # so that the mean of equal values is that value
    deviation, mean = torch.std_mean(cells, dim=1, correction=0, keepdim=True)
    return (cells >= mean - margin * deviation).view(saliency.shape)


@compile_on_gpu
def pick(group: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """`count` members of each group, uniformly and without replacement.

    Every cell has a uniform score; those whose rank within the group is below the count are picked.

    Args:
        group: (N, C) bool. count: (N,) integer; above the group's size it takes all of it.
        score: (N, C) float64 in 0 .. 1 (float32 has so few values that two of them would tie).

    Returns:
        (N, C) bool.
    """
    score = score.masked_fill(~group, 2.0)
    rank = (score.unsqueeze(-2) < score.unsqueeze(-1)).sum(-1)
    return group & (rank < count.unsqueeze(1))


@compile_on_gpu
def foreground_count(ratio: Tensor, front: Tensor, recipe: Recipe) -> Tensor:
    """round(ratio * foreground share * cells), ties to even, under the recipe's cap.

    Args:
        ratio: (N,) float64. front: (N, cells) bool.
    """
    share = ratio * front.sum(1) / front.shape[1]
    if recipe.foreground_cap is not None:
        limit, value = recipe.foreground_cap
        share = torch.where(share >= limit, value, share)
    return (share * front.shape[1]).round().long()


@mask("spread")
def spread(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """floor(ratio * cells) in all, spread evenly over foreground and background (the method's)."""
    front = foreground(saliency, recipe.foreground_margin).flatten(1)
    of_front = foreground_count(ratio, front, recipe)
    of_back = ((ratio * front.shape[1]).floor().long() - of_front).clamp(min=0)
    score = rng.uniform(*front.shape)
    picked = pick(front, of_front, score) | pick(~front, of_back, score)
    return picked.view(saliency.shape)


@mask("foreground")
def of_foreground(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """That ratio of the foreground's cells, under the recipe's cap (the method's hard negative)."""
    front = foreground(saliency, recipe.foreground_margin).flatten(1)
    count = foreground_count(ratio, front, recipe)
    return pick(front, count, rng.uniform(*front.shape)).view(saliency.shape)


@mask("background")
def of_background(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """That ratio of the background's cells, rounded to even."""
    back = ~foreground(saliency, recipe.foreground_margin).flatten(1)
    count = (ratio * back.sum(1)).round().long()
    return pick(back, count, rng.uniform(*back.shape)).view(saliency.shape)


@mask("random")
def at_random(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """floor(ratio * cells) of all cells, whatever the saliency."""
    cells = torch.ones_like(saliency, dtype=torch.bool).flatten(1)
    count = (ratio * cells.shape[1]).floor().long()
    return pick(cells, count, rng.uniform(*cells.shape)).view(saliency.shape)


@mask("block")
def block(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """One rectangle of that ratio's area anywhere in the view, whatever the saliency."""
    low, high = torch.tensor(BLOCK_ASPECT, dtype=torch.float64).log().tolist()
    aspect = (low + (high - low) * rng.uniform(len(ratio))).exp()
    side = recipe.crop_size
    height = (side * (ratio * aspect).sqrt()).round().clamp(max=side)
    width = (side * (ratio / aspect).sqrt()).round().clamp(max=side)
    return rectangle(height, width, side, rng.uniform(len(ratio), 2))


@compile_on_gpu
def rectangle(height: Tensor, width: Tensor, side: int, position: Tensor) -> Tensor:
    """A rectangle in each view of `side` pixels, every place as likely.

    Args:
        height, width: (N,) whole numbers up to `side`. position: (N, 2) uniform in 0 .. 1.

    Returns:
        (N, side, side) bool, True inside.
    """
    axis = torch.arange(side, device=position.device)

    def inside(extent: Tensor, place: Tensor) -> Tensor:
        start = (place * (side - extent + 1)).floor().unsqueeze(1)
        return (axis >= start) & (axis < start + extent.unsqueeze(1))

    return inside(height, position[:, 0]).unsqueeze(2) & inside(width, position[:, 1]).unsqueeze(1)


@dataclass(frozen=True)
class Masks:
    """What was drawn for a batch of views.

    Attributes:
        cells: (N, C, h, w) bool, C 1 or 3, True where filled; h and w divide the crop.
        window: (N, crop, crop) bool, True where filled; None in a recipe without windows.
        ratio: (N,) float64; the drawn mask ratio.
        focal: (N,) bool; True where the window holds in place of the cells.
    """

    cells: Tensor
    window: Tensor | None
    ratio: Tensor
    focal: Tensor

    @classmethod
    def concatenate(cls, masks: Sequence["Masks"]) -> "Masks":
        """Return the masks of several batches as those of one, of one recipe."""
        windows = [one.window for one in masks if one.window is not None]
        return cls(
            torch.cat([one.cells for one in masks]),
            torch.cat(windows) if windows else None,
            torch.cat([one.ratio for one in masks]),
            torch.cat([one.focal for one in masks]),
        )

    def of(self, rows: slice) -> "Masks":
        """Return the masks of these rows."""
        window = None if self.window is None else self.window[rows]
        return Masks(self.cells[rows], window, self.ratio[rows], self.focal[rows])

    def pixels(self, rows: slice, side: int) -> Tensor:
        """Return (n, C, side, side) float32 of these rows, 1 where filled and 0 elsewhere."""
        cells = self.cells[rows].float()
        pixels = cells.repeat_interleave(side // cells.shape[3], 3)
        pixels = pixels.repeat_interleave(side // cells.shape[2], 2)
        if self.window is not None:
            window = self.window[rows].unsqueeze(1).float()
            pixels = torch.lerp(pixels, window, self.focal[rows].float().view(-1, 1, 1, 1))
        return pixels


def draw(saliency: Tensor, recipe: Recipe, role: Role, rng: Rng) -> Masks:
    """Draw the masks of a batch of views.

    Args:
        saliency: (N, G, G) float32, each view's own.
        role: which mask and which ratio of the recipe; a focal `query` keeps what is inside the
            window, a `hard_negative` loses it.
    """
    size = len(saliency)
    low, high = recipe.query_ratio if role == "query" else recipe.hard_negative_ratio
    ratio = low + (high - low) * rng.uniform(size)
    function = find("mask", getattr(recipe, f"{role}_mask"), MASKS)
    if recipe.channel_probability > 0:
        thrice, ratios = saliency.repeat_interleave(3, 0), ratio.repeat_interleave(3)
        cells = function(thrice, ratios, recipe, rng).unflatten(0, (size, 3))
        by_channel = rng.uniform(size, 1, 1, 1) < recipe.channel_probability
        cells = torch.where(by_channel, cells, cells[:, :1])
    else:
        cells = function(saliency, ratio, recipe, rng).unsqueeze(1)

    focal, window = torch.zeros_like(ratio, dtype=torch.bool), None
    if recipe.focal_probability > 0:
        focal = rng.uniform(size) < recipe.focal_probability
        kept = role == "query"
        side = recipe.focal_side(recipe.focal_kept if kept else recipe.focal_filled)
        extent = torch.full_like(ratio, side)
        window = rectangle(extent, extent, recipe.crop_size, rng.uniform(size, 2))
        window = ~window if kept else window
    return Masks(cells, window, ratio, focal)
