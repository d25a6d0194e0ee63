"""The content of masked pixels: noise, strong blur, mean, or a user's function.

Relation to the released code (docs/method.md, D8, D9 and D14):

* D8: noise replaces the pixel, as released (the poster says "add"; on high-pass images the mean is
  near zero).
* D9: each view of each sample has its own noise, so a batch shares no texture (released: one tile
  for a batch). As released, the noise is a tile of one cell that is repeated over the view. Focal
  windows are filled with it too (released: new noise), because drawing a normal number for every
  pixel costs more on a CPU than all other masking work.
* D14: the mean is each view's own, per channel, over all its pixels before masking, as released.

A custom fill is one function: docs/pipeline.md has an example.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pipeline.blur import apply_shared_blur
from pipeline.recipes import Recipe
from pipeline.registry import register
from pipeline.rng import Rng

Fill = Callable[[Tensor, Recipe, float, Rng], Tensor]
"""Signature of a fill: (image, recipe, std, rng) -> content, broadcastable to the image.

image: (N, 3, H, W) float32, normalized, as the encoder would see it unmasked. std: standard
deviation of the recipe's noise for this view, in normalized units. rng: source of all randomness.
On a CPU a batch is passed in parts. A user's fill may change the image, which is a copy, in place.
"""

FILLS: dict[str, Fill] = {}
fill = partial(register, "fill", registry=FILLS)
"""The decorator `@fill("name")` registers a function as a fill that a recipe can name."""


@fill("noise")
def fill_with_noise(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """Return noise from N(0, std^2)."""
    return repeat_tile(rng.normal(len(image), 3, recipe.cell, recipe.cell) * std, recipe)


@fill("blur")
def fill_with_blur(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """Return the strongly blurred view."""
    return apply_shared_blur(image, recipe.blur_kernel, recipe.blur_sigma)


@fill("mean")
def fill_with_mean(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """Return the mean of each channel of the view."""
    return image.mean((2, 3), keepdim=True)


def repeat_tile(tile: Tensor, recipe: Recipe) -> Tensor:
    """Repeat tiles of one cell, (N, 3, cell, cell), over the views."""
    return tile.repeat(1, 1, recipe.grid, recipe.grid)
