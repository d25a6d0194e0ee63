"""What the encoder sees and what stands in masked pixels: high-pass, noise, strong blur, mean.

Image-wide filters run in the DALI graph, on pixels (0 .. 255) that are normalised afterwards: a
blur's kernel sums to one, so this equals filtering the normalised view. DALI's Gaussian blur
reflects the border without repeating the edge, as torchvision's does (they agree to 1e-4 of 255).

Against the released code (methods table D8, D9, D14):

* D8 noise replaces the pixel (the poster says "add"; on high-pass images the mean is near zero);
* D9 each view of each sample has noise of its own, so no texture is shared over a batch. It is a
  tile of one cell, repeated over the view (also outside focal windows): a full field of normal
  numbers costs three times as much on a CPU;
* D14 the mean is each view's own, per channel, over all its pixels before masking.
"""

from collections.abc import Callable
from typing import Any

import torch
from nvidia.dali import fn, types
from torch import Tensor

from pipeline.recipes import Recipe

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of R, G, B in 0 .. 1, as in torchvision."""


def normalised(view: Any, mean: tuple[float, float, float] = MEAN) -> Any:
    """In the graph: float32 HWC 0 .. 255 -> the same, normalised."""
    return fn.crop_mirror_normalize(
        view,
        mean=[255 * value for value in mean],
        std=[255 * value for value in STD],
        output_layout="HWC",
        dtype=types.FLOAT,
    )


def encoder_input(view: Any, recipe: Recipe) -> Any:
    """In the graph: an unmasked view as the encoder gets it. float32 HWC 0 .. 255 -> the same."""
    if not recipe.high_pass:
        return normalised(view)
    window, sigma = recipe.high_pass_kernel, recipe.high_pass_sigma
    detail = view - fn.gaussian_blur(view, window_size=window, sigma=sigma)
    # (x - mean) / std - (blur(x) - mean) / std: the means cancel
    return normalised(detail, mean=(0.0, 0.0, 0.0))


def strong_blur(view: Any, recipe: Recipe) -> Any:
    """In the graph: what a blur fill takes its pixels from, float32 HWC 0 .. 255 -> normalised."""
    return normalised(
        fn.gaussian_blur(view, window_size=recipe.blur_kernel, sigma=recipe.blur_sigma)
    )


def fill_noise(
    image: Tensor,
    mask: Tensor,
    blur: Tensor | None,
    deviation: float,
    cell: int,
    generator: torch.Generator,
) -> Tensor:
    """Masked pixels become N(0, deviation^2)."""
    tile = torch.randn(len(image), cell, cell, 3, device=image.device, generator=generator)
    grid = image.shape[-1] // cell
    noise = (deviation * tile).repeat(1, grid, grid, 1).permute(0, 3, 1, 2)
    return torch.where(mask, noise, image, out=noise)


def fill_blur(
    image: Tensor,
    mask: Tensor,
    blur: Tensor | None,
    deviation: float,
    cell: int,
    generator: torch.Generator,
) -> Tensor:
    """Masked pixels become those of the view's own strong blur."""
    assert blur is not None, "the graph makes a strong blur for every recipe that fills with it"
    return torch.where(mask, blur, image)


def fill_mean(
    image: Tensor,
    mask: Tensor,
    blur: Tensor | None,
    deviation: float,
    cell: int,
    generator: torch.Generator,
) -> Tensor:
    """Masked pixels become the view's own mean of their channel."""
    return torch.where(mask, image.mean((2, 3), keepdim=True), image)


FILLS: dict[str, Callable[..., Tensor]] = {
    "noise": fill_noise,
    "blur": fill_blur,
    "mean": fill_mean,
}
"""What a recipe's `fill` names. Each returns a new (N, 3, H, W) channels_last tensor.

image: (N, 3, H, W) float32. mask: the same shape, bool. blur: as image, None unless the fill is
`blur`. deviation: of the noise, normalised units. cell: side in pixels. generator: for its draws.
"""
