"""The released code as it is, defects included, for whoever wants to repeat its numbers.

Whether the published numbers came from these defects cannot be known. The rest of the pipeline is
what the poster means; here stand the masks, the noise and the recipes of the released code
(joycenerd/Saliency-Guided-Masking-for-ConvNets, localize.py and random_mask_*.py), registered by
name as a user's own would be. By the numbers of its defects in docs/method.md:

* D1 each row of the saliency is sorted before it is thresholded: a row keeps its number of
  foreground cells, but they are its right-most ones;
* D9 all views of a batch share one tile of noise;
* D12 a background count of -1 masks all background cells but one;
* D13 a foreground, or a background, of a single cell is never masked.

D2 and D3 (one image's hard negative for the whole batch, normalized alone) are MoCo's:
`--method moco --shared-hard-negative`. D15 is how every encoder of a high-pass recipe is evaluated.

Not repeated: focal windows are filled with the shared tile as well, where the released code draws
fresh noise around a query's window and one patch of a window's size for a batch's hard negatives;
and the saliency is the stored one, not that of the augmented crop.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.fills import fill
from pipeline.masks import foreground, foreground_count, mask, pick
from pipeline.recipes import RECIPES, Recipe
from pipeline.rng import Rng


def released_foreground(saliency: Tensor, margin: float) -> Tensor:
    """Threshold each row after it was sorted (D1): (N, G, G) -> (N, G * G) bool."""
    return foreground(saliency.sort(dim=2).values, margin).flatten(1)


def pick_as_released(group: Tensor, count: Tensor, score: Tensor) -> Tensor:
    """Pick `indices.squeeze()[:count]` of each group in random order, as the released code does.

    Args:
        group, score: as of `pipeline.masks.pick`. count: (N,) integer, may be negative.
    """
    size = group.sum(1)
    kept = torch.where(count < 0, (size + count).clamp(min=0), count)  # D12: a slice from the end
    return pick(group, kept.masked_fill(size == 1, 0), score)  # D13: squeezed to a scalar


@mask("spread-released")
def spread_as_released(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask a query as the released code does: `spread` with D1, D12 and D13."""
    front = released_foreground(saliency, recipe.foreground_margin)
    of_front = foreground_count(ratio, front, recipe)
    of_back = (ratio * front.shape[1]).floor().long() - of_front
    score = rng.uniform(*front.shape)
    picked = pick_as_released(front, of_front, score) | pick_as_released(~front, of_back, score)
    return picked.view(saliency.shape)


@mask("foreground-released")
def foreground_as_released(saliency: Tensor, ratio: Tensor, recipe: Recipe, rng: Rng) -> Tensor:
    """Mask a hard negative as the released code does: `foreground` with D1 and D13."""
    front = released_foreground(saliency, recipe.foreground_margin)
    count = foreground_count(ratio, front, recipe)
    picked = pick_as_released(front, count, rng.uniform(*front.shape))
    return picked.view(saliency.shape)


@fill("noise-released")
def noise_as_released(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """Fill all views with one tile of N(0, std^2) noise (D9): that of the first view.

    So a view depends on the others that come with it, in this fill alone. On a GPU these are the
    rank's batch, as in the released code; on a CPU a batch comes in parts of a few views, and each
    part has a tile of its own.
    """
    tiles = rng.normal(len(image), 3, recipe.cell, recipe.cell)
    return tiles[:1].mul_(std).repeat(1, 1, recipe.grid, recipe.grid)


def as_released(name: str) -> Recipe:
    """Return a recipe of the poster's form with the masks of the released code."""
    return replace(
        RECIPES[name], query_mask="spread-released", hard_negative_mask="foreground-released"
    )


RECIPES.update(
    {
        "hp-released": replace(as_released("hp"), fill="noise-released"),
        "blur-released": as_released("blur"),
        "mean-released": as_released("mean"),
    }
)
