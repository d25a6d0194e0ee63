"""Photometric augmentation of MoCo v2 and SimCLR: color jitter, grayscale, soft blur.

The formulas are those of torchvision's ColorJitter (each sample has its own factors and its own
order of adjustments, and is clamped after each of them), but on floats: torchvision rounds PIL
images to 8 bits in between. The blur is a Gaussian truncated at three sigma on either side; MoCo v2
uses PIL's, which approximates it by three box blurs.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.blur import blur_by_matrix, build_soft_blur_kernel
from pipeline.devices import to_device
from pipeline.recipes import Range, Recipe
from pipeline.rng import Rng

GRAY = (0.299, 0.587, 0.114)
"""Weights of R, G and B in gray (ITU-R BT.601, as in PIL)."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Photometric:
    """Photometric parameters of N views, on the CPU.

    Attributes:
        order: (N, 4) int64, the adjustments from first to last: 0 brightness, 1 contrast,
            2 saturation, 3 hue.
        brightness, contrast, saturation: (N,) float64 factors; 1 changes nothing.
        hue: (N,) float64, turns of the color circle; 0 changes nothing.
        gray: (N,) bool, True for views that become gray.
        sigma: (N,) float64 pixels of the soft blur; 0 for none.
    """

    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    sigma: Tensor

    def select(self, rows: slice) -> "Photometric":
        """Return the parameters of these rows."""
        return Photometric(*(getattr(self, field.name)[rows] for field in fields(self)))

    def split(self) -> list["ViewPhotometric"]:
        """Return the parameters of each view, as Python numbers."""
        factors = torch.stack([self.brightness, self.contrast, self.saturation], 1)
        columns = (self.order, factors, self.hue, self.gray, self.sigma)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [ViewPhotometric(*row) for row in rows]


class ViewPhotometric(NamedTuple):
    """Photometric parameters of one view.

    Attributes:
        order, hue, gray, sigma: see `Photometric`.
        factors: brightness, contrast, saturation.
    """

    order: list[int]
    factors: list[float]
    hue: float
    gray: bool
    sigma: float


UNCHANGED = ViewPhotometric(order=[], factors=[], hue=0.0, gray=False, sigma=0.0)
"""Photometric parameters of a view without augmentation."""


def draw_photometric(size: int, recipe: Recipe, rng: Rng) -> Photometric:
    """Draw the photometric parameters of `size` views."""

    def flip_coin(probability: float) -> Tensor:
        return rng.uniform_on_host(size) < probability

    def draw_between(limits: Range) -> Tensor:
        low, high = limits
        return low + (high - low) * rng.uniform_on_host(size)

    is_jittered = flip_coin(recipe.jitter_probability)

    def draw_factor(change: float) -> Tensor:
        return torch.where(is_jittered, draw_between((1 - change, 1 + change)), 1.0)

    return Photometric(
        order=rng.uniform_on_host(size, 4).argsort(1),
        brightness=draw_factor(recipe.brightness),
        contrast=draw_factor(recipe.contrast),
        saturation=draw_factor(recipe.saturation),
        hue=torch.where(is_jittered, draw_between((-recipe.hue, recipe.hue)), 0.0),
        gray=flip_coin(recipe.grayscale_probability),
        sigma=torch.where(
            flip_coin(recipe.soft_blur_probability), draw_between(recipe.soft_blur_sigma), 0.0
        ),
    )


def augment_on_gpu(view: Tensor, parameters: Photometric) -> Tensor:
    """Jitter colors, convert to gray and blur, for a batch on a GPU without a compiler.

    Args:
        view: (N, H, W, 3) uint8.

    Returns:
        (N, 3, H, W) float32 in 0 .. 1.
    """
    image = view.permute(0, 3, 1, 2).contiguous().float().div_(255)
    for kind in parameters.order.unbind(1):
        blend_(image, kind, parameters)
        rows = ((kind == HUE) & (parameters.hue != 0)).nonzero().squeeze(1)
        if len(rows):
            turns, places = (to_device(x, image.device) for x in (parameters.hue[rows], rows))
            image[places] = rotate_hue(image[places], turns)
    if parameters.gray.any():
        weight = to_device(parameters.gray.float(), image.device).view(-1, 1, 1, 1)
        image.lerp_(convert_to_gray(image), weight)
    rows = (parameters.sigma > 0).nonzero().squeeze(1)
    if len(rows):
        places = to_device(rows, image.device)
        image[places] = blur_by_matrix(
            image[places], build_soft_blur_kernel(parameters.sigma[rows])
        )
    return image


def blend_(image: Tensor, kind: Tensor, parameters: Photometric) -> None:
    """Adjust brightness, contrast or saturation in place, as `kind` (N,) says for each view.

    The result is f x + (1 - f) y, where y is black, the view's mean gray or the pixel's gray.
    """
    factor = torch.ones(len(kind), dtype=torch.float64)
    for name, values in (
        (BRIGHTNESS, parameters.brightness),
        (CONTRAST, parameters.contrast),
        (SATURATION, parameters.saturation),
    ):
        factor = torch.where(kind == name, values, factor)
    if (factor == 1).all():
        return
    parts = torch.stack([1 - factor, kind == CONTRAST, kind == SATURATION])
    weight, of_mean, of_pixel = to_device(parts.float(), image.device).view(3, -1, 1, 1, 1)
    gray = convert_to_gray(image)
    mean = of_mean * gray.mean((1, 2, 3), keepdim=True)
    image.lerp_(gray.mul_(of_pixel).add_(mean), weight).clamp_(0, 1)


def convert_to_gray(image: Tensor) -> Tensor:
    """Convert (N, 3, H, W) to gray, (N, 1, H, W)."""
    red, green, blue = image.split(1, dim=1)
    return (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def rotate_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hues of (N, 3, H, W) in 0 .. 1; saturation and value (HSV) stay the same."""
    red, green, blue = image.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    # any finite scale does for gray pixels, because their span is 0
    scale = span.clamp(min=1e-8).reciprocal_()
    # the hue in sixths of a turn: 0 red, 2 green, 4 blue. A lerp with a weight of 0 or 1 selects
    sixths = (red - green).mul_(scale).add_(4)
    of_green, of_red = (blue - red).mul_(scale).add_(2), (green - blue).mul_(scale)
    scratch = torch.empty_like(sixths)
    sixths.lerp_(of_green, torch.eq(high, green, out=scratch))
    sixths.lerp_(of_red, torch.eq(high, red, out=scratch))
    sixths.add_(6 * turns.float().view(-1, 1, 1))
    sixths.sub_(6 * torch.mul(sixths, 1 / 6, out=scratch).floor_())  # into 0 .. 6
    result = torch.empty_like(image)
    for channel, middle in zip(result.unbind(1), (3, 2, 4), strict=True):
        share = torch.sub(sixths, middle, out=channel).abs_()
        share = share.sub_(1) if middle == 3 else share.neg_().add_(2)
        share.clamp_(0, 1).mul_(span).add_(low)
    return result
