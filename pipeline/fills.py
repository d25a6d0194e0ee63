"""What stands in masked pixels: noise, strong blur, mean, or a function of yours.

Against the released code (docs/method.md, D8, D9, D14), decided once here:

* D8 noise replaces the pixel (the poster says "add"; on high-pass images the mean is near zero);
* D9 each view of each sample has noise of its own, so no texture is shared over a batch. It is a
  tile of one cell, repeated over the view (also outside focal windows): a full field of normal
  numbers costs more than all the rest of masking on a CPU;
* D14 the mean is each view's own, per channel, over all its pixels before masking.

A fill of your own is one function: docs/pipeline.md has an example.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pipeline.blur import shared_blur
from pipeline.recipes import Recipe
from pipeline.registry import register
from pipeline.rng import Rng

Fill = Callable[[Tensor, Recipe, float, Rng], Tensor]
"""(image, recipe, std, rng) -> what stands in masked pixels, broadcastable to the image.

image: (N, 3, H, W) float32, normalised, as the encoder would see it unmasked. std: the recipe's
noise for this view, in normalised units. rng: for all randomness. On a CPU a batch comes
in parts.
"""

FILLS: dict[str, Fill] = {}
fill = partial(register, "fill", registry=FILLS)
"""`@fill("name")` makes a function a fill that a recipe can name."""


@fill("noise")
def noise(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """N(0, std^2)."""
    return repeat_tile(rng.normal(len(image), 3, recipe.cell, recipe.cell) * std, recipe)


@fill("blur")
def blur(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """The view's own strong blur."""
    return shared_blur(image, recipe.blur_kernel, recipe.blur_sigma)


@fill("mean")
def mean(image: Tensor, recipe: Recipe, std: float, rng: Rng) -> Tensor:
    """The view's own mean of each channel."""
    return image.mean((2, 3), keepdim=True)


def repeat_tile(tile: Tensor, recipe: Recipe) -> Tensor:
    """Repeat a tile of one cell (N, 3, cell, cell) over the view."""
    return tile.repeat(1, 1, recipe.grid, recipe.grid)
