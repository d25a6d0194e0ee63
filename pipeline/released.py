"""Reproduce the released code, including its defects, for comparisons with its numbers.

It is unknown whether the published numbers depend on these defects. The other modules implement
the method as the poster describes it; this one has the masks, the noise and the recipes of the
released code (joycenerd/Saliency-Guided-Masking-for-ConvNets, localize.py and random_mask_*.py),
registered by name like a user's own. The numbers refer to docs/method.md:

* D1: each row of the saliency is sorted before it is thresholded, so a row keeps its number of
  foreground cells, but they are its right-most ones.
* D9: all views of a batch share one tile of noise.
* D12: a background count of -1 masks all background cells but one.
* D13: a foreground or background of a single cell is never masked.

D2 and D3 (the hard negative of one image for the entire batch, normalized alone) belong to MoCo:
`--method moco --shared-hard-negative`. D15 is how every encoder of a high-pass recipe is evaluated.

Two details differ. Focal windows are filled with the shared tile too, whereas the released code
draws new noise around a query's window, and one window-sized patch for all hard negatives of a
batch. And the saliency is the stored one, not that of the augmented crop.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.fills import fill, repeat_tile
from pipeline.masks import count_masked_foreground, find_foreground, mask, pick_cells
from pipeline.recipes import RECIPES, Recipe
from pipeline.rng import Rng


def find_released_foreground(saliency: Tensor, margin: float) -> Tensor:
    """Threshold the saliency after sorting each row (D1): (N, G, G) -> (N, G * G) bool."""
    return find_foreground(saliency.sort(dim=2).values, margin).flatten(1)


def pick_as_released(group: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """Pick `indices.squeeze()[:count]` of each group in random order, as the released code does.

    Args:
        group, score: see `pipeline.masks.pick_cells`. count: (N,) integer, may be negative.
    """
    size = group.sum(1)
    # D12: a negative count slices from the end
    effective_count = torch.where(count < 0, (size + count).clamp(min=0), count)
    # D13: a single index is squeezed to a scalar
    return pick_cells(group, effective_count.masked_fill(size == 1, 0), score)


@mask("spread-released")
def mask_evenly_as_released(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask a query as the released code does: `spread` with D1, D12 and D13."""
    front = find_released_foreground(saliency, recipe.foreground_margin)
    front_count = count_masked_foreground(ratio, front, recipe)
    back_count = (ratio * front.shape[1]).floor().long() - front_count
    score = rng.uniform(*front.shape)
    picked = pick_as_released(front, front_count, score) | pick_as_released(
        ~front, back_count, score
    )
    return picked.view(saliency.shape)


@mask("foreground-released")
def mask_foreground_as_released(
    saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng
) -> Tensor:
    """Mask a hard negative as the released code does: `foreground` with D1 and D13."""
    front = find_released_foreground(saliency, recipe.foreground_margin)
    count = count_masked_foreground(ratio, front, recipe)
    picked = pick_as_released(front, count, rng.uniform(*front.shape))
    return picked.view(saliency.shape)


@fill("noise-released")
def fill_with_noise_as_released(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """Fill all views with one tile of N(0, std^2) noise (D9), that of the first view.

    With this fill only, a view depends on the others that are passed with it. On a GPU these are
    the rank's batch, as in the released code; on a CPU a batch is passed in parts of a few views,
    and each part has its own tile.
    """
    tiles = rng.normal(len(image), 3, recipe.cell, recipe.cell)
    return repeat_tile(tiles[:1] * std, recipe)


def use_released_masks(name: str) -> Recipe:
    """Return the recipe of this name with the masks of the released code."""
    return replace(
        RECIPES[name], query_mask="spread-released", hard_negative_mask="foreground-released"
    )


RECIPES.update(
    {
        "hp-released": replace(use_released_masks("hp"), fill="noise-released"),
        "blur-released": use_released_masks("blur"),
        "mean-released": use_released_masks("mean"),
    }
)
