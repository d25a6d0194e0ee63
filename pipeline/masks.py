"""Which pixels of a view are masked: saliency -> foreground -> counts -> cells or a window.

Everything is a tensor operation on the batch: no Python loop over samples or cells, no sort, no
trip to the host. Against the released code (methods table D1, D2, D10-D13), decided once here:

* D1 the foreground stays where the saliency is (the release sorts each row before thresholding);
* D2 each sample's hard negative is made of its own key (the release picks one image of the batch);
* D10 the cap belongs to `hp` alone, as released;
* D11 focal windows ignore saliency, as released and as in the poster's figure;
* D12 a background count is never negative (the release then masks all but one cell);
* D13 a group of a single cell can be masked (the release drops it).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.recipes import Range, Recipe

Role = Literal["query", "hard_negative"]


@dataclass(frozen=True)
class Masks:
    """What a batch of masks is.

    Attributes:
        pixels: (N, 3, H, W) bool, channels_last; True where the view is filled.
        ratio: (N,) float64; the drawn mask ratio.
        focal: (N,) bool; True where a window was drawn in place of cells.
    """

    pixels: Tensor
    ratio: Tensor
    focal: Tensor


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


def counts(
    ratio: Tensor, in_foreground: Tensor, cells: int, role: Role, cap: Range | None
) -> Tensor:
    """How many cells are masked in the foreground and in the background.

    With share = in_foreground / cells: round(ratio * share * cells) of the foreground, ties to
    even; for a query also floor(ratio * cells) less that of the background, never below 0.

    Args:
        ratio: (N,) float64. in_foreground: (N,) int64, foreground cells.
        cap: (limit, value) for ratio * share.

    Returns:
        (N, 2) int64: foreground, background.
    """
    masked_share = ratio * in_foreground / cells
    if cap is not None:
        limit, value = cap
        masked_share = torch.where(masked_share >= limit, value, masked_share)
    of_foreground = (masked_share * cells).round().long()
    if role == "query":
        of_background = ((ratio * cells).floor().long() - of_foreground).clamp(min=0)
    else:
        of_background = torch.zeros_like(of_foreground)
    return torch.stack([of_foreground, of_background], dim=1)


def pick(group: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """`count` members of each group, uniformly and without replacement.

    Every cell has a uniform score; those whose rank within the group is below the count are picked.

    Args:
        group: (..., C) bool. count: (..., 1) integer; above the group's size it takes all of it.

    Returns:
        (..., C) bool.
    """
    # float64: two equal scores would make one cell too many, and float32 has only 2^24 of them
    score = torch.rand(group.shape, dtype=torch.float64, device=group.device, generator=generator)
    score = score.masked_fill(~group, 2.0)
    rank = (score.unsqueeze(-2) < score.unsqueeze(-1)).sum(-1)
    return group & (rank < count)


def draw(saliency: Tensor, recipe: Recipe, role: Role, generator: torch.Generator) -> Masks:
    """Draw the masks of a batch of views.

    Args:
        saliency: (N, G, G) float, on the generator's device: each view's own.
        role: a `query` is masked all over; a `hard_negative` in its foreground only.
    """
    size, device = len(saliency), saliency.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)

    low, high = recipe.query_ratio if role == "query" else recipe.hard_negative_ratio
    ratio = low + (high - low) * uniform(size)
    focal = uniform(size) < recipe.focal_probability
    by_channel = uniform(size) < recipe.channel_probability

    cells = recipe.grid**2
    if recipe.guided:
        front = foreground(saliency, recipe.foreground_margin).flatten(1)
        number = counts(ratio, front.sum(1), cells, role, recipe.foreground_cap)
    else:
        front = torch.ones(size, cells, dtype=torch.bool, device=device)
        number = torch.stack([(ratio * cells).floor().long(), torch.zeros_like(focal).long()], 1)
    groups = torch.stack([front, ~front], dim=1)  # (N, 2, cells)
    channels = groups.unsqueeze(1).expand(-1, 3, -1, -1)  # a draw for each channel
    picked = pick(channels, number[:, None, :, None], generator).any(2)  # (N, 3, cells)
    picked = torch.where(by_channel[:, None, None], picked, picked[:, :1])

    grid = picked.view(size, 3, recipe.grid, recipe.grid).permute(0, 2, 3, 1)
    pixels = grid.repeat_interleave(recipe.cell, 1).repeat_interleave(recipe.cell, 2)
    if recipe.focal_probability > 0:
        window = focal_window(recipe, role, uniform(2, size))
        torch.where(focal[:, None, None, None], window.unsqueeze(-1), pixels, out=pixels)
    return Masks(pixels.permute(0, 3, 1, 2), ratio, focal)


def focal_window(recipe: Recipe, role: Role, position: Tensor) -> Tensor:
    """A window at a uniform place: a query keeps what is inside, a hard negative loses it.

    Args:
        position: (2, N) in 0 .. 1, the first for rows, the second for columns.

    Returns:
        (N, H, W) bool, True where filled.
    """
    kept = role == "query"
    side = recipe.focal_side(recipe.focal_kept if kept else recipe.focal_filled)
    start = (position * (recipe.crop_size - side + 1)).long().unsqueeze(-1)  # (2, N, 1)
    axis = torch.arange(recipe.crop_size, device=position.device)
    rows, columns = (axis >= start) & (axis < start + side)
    inside = rows.unsqueeze(2) & columns.unsqueeze(1)
    return ~inside if kept else inside
