"""Photometric augmentation of MoCo v2 and SimCLR: color jitter, grayscale, soft blur.

The formulas are those of torchvision's ColorJitter (each sample with its own factors, in an order
of its own, clamped after each adjustment), on floats: torchvision rounds PIL images to 8 bits in
between. The blur is a Gaussian cut at three sigma on either side; PIL's, which
MoCo v2 uses, is a threefold box that comes near it.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.blur import build_soft_blur_kernel, gaussian_blur
from pipeline.devices import to_device
from pipeline.recipes import Range, Recipe
from pipeline.rng import Rng

GRAY = (0.299, 0.587, 0.114)
"""Weights of R, G, B in gray (ITU-R BT.601, as in PIL)."""

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Photometric:
    """What was drawn for N views, on the CPU.

    Attributes:
        order: (N, 4) int64; the adjustments from first to last: 0 brightness, 1 contrast,
            2 saturation, 3 hue.
        brightness, contrast, saturation: (N,) float64 factors; 1 changes nothing.
        hue: (N,) float64, turns of the color circle; 0 changes nothing.
        gray: (N,) bool.
        sigma: (N,) float64 pixels of the soft blur; 0 for none.
    """

    order: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    sigma: Tensor

    def of(self, rows: slice) -> "Photometric":
        """What was drawn for these rows."""
        return Photometric(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw(size: int, recipe: Recipe, rng: Rng) -> Photometric:
    """Draw the parameters of `size` views."""

    def coin(probability: float) -> Tensor:
        return rng.on_host(size) < probability

    def between(limits: Range) -> Tensor:
        low, high = limits
        return low + (high - low) * rng.on_host(size)

    jittered = coin(recipe.jitter_probability)

    def factor(change: float) -> Tensor:
        return torch.where(jittered, between((1 - change, 1 + change)), 1.0)

    return Photometric(
        order=rng.on_host(size, 4).argsort(1),
        brightness=factor(recipe.brightness),
        contrast=factor(recipe.contrast),
        saturation=factor(recipe.saturation),
        hue=torch.where(jittered, between((-recipe.hue, recipe.hue)), 0.0),
        gray=coin(recipe.grayscale_probability),
        sigma=torch.where(coin(recipe.soft_blur_probability), between(recipe.soft_blur_sigma), 0.0),
    )


def apply(view: Tensor, drawn: Photometric) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in 0 .. 1."""
    if view.device.type == "cpu":
        return torch.cat([apply_to_one(view[row], drawn, row) for row in range(len(view))])
    return apply_to_batch(view, drawn)


def apply_to_one(view: Tensor, drawn: Photometric, row: int) -> Tensor:
    """Change the colors of one view on a CPU: (H, W, 3) uint8 -> (1, 3, H, W) float32 in 0 .. 1.

    It takes the passes over memory that this view needs, and no batch changes its rounding.
    """
    image = view.permute(2, 0, 1).contiguous().float().div_(255).unsqueeze(0)
    for kind in drawn.order[row].tolist():
        if kind == HUE:
            if (turns := drawn.hue[row : row + 1]) != 0:
                image = turn_hue(image, turns)
            continue
        factor = float((drawn.brightness, drawn.contrast, drawn.saturation)[kind][row])
        if factor == 1:
            continue
        if kind == BRIGHTNESS:
            image.mul_(factor)
        elif kind == CONTRAST:
            image.lerp_(gray_of(image).mean(), 1 - factor)
        else:
            image.lerp_(gray_of(image), 1 - factor)
        image.clamp_(0, 1)
    if drawn.gray[row]:
        image = gray_of(image).expand_as(image).contiguous()
    if (sigma := drawn.sigma[row : row + 1]) > 0:
        image = gaussian_blur(image, build_soft_blur_kernel(sigma))
    return image


def apply_to_batch(view: Tensor, drawn: Photometric) -> Tensor:
    """Do the same to a batch at once, for a GPU whose machine has no compiler."""
    image = view.permute(0, 3, 1, 2).contiguous().float().div_(255)
    for kind in drawn.order.unbind(1):
        blend_(image, kind, drawn)
        rows = ((kind == HUE) & (drawn.hue != 0)).nonzero().squeeze(1)
        if len(rows):
            turns, places = (to_device(x, image.device) for x in (drawn.hue[rows], rows))
            image[places] = turn_hue(image[places], turns)
    if drawn.gray.any():
        weight = to_device(drawn.gray.float(), image.device).view(-1, 1, 1, 1)
        image.lerp_(gray_of(image), weight)
    rows = (drawn.sigma > 0).nonzero().squeeze(1)
    if len(rows):
        places = to_device(rows, image.device)
        image[places] = gaussian_blur(image[places], build_soft_blur_kernel(drawn.sigma[rows]))
    return image


def blend_(image: Tensor, kind: Tensor, drawn: Photometric) -> None:
    """Adjust brightness, contrast or saturation in place, whichever `kind` (N,) says.

    Each is f x + (1 - f) other, where the other is black, the view's mean gray or the pixel's gray.
    """
    factor = torch.ones(len(kind), dtype=torch.float64)
    for name, values in (
        (BRIGHTNESS, drawn.brightness),
        (CONTRAST, drawn.contrast),
        (SATURATION, drawn.saturation),
    ):
        factor = torch.where(kind == name, values, factor)
    if (factor == 1).all():
        return
    parts = torch.stack([1 - factor, kind == CONTRAST, kind == SATURATION])
    weight, of_mean, of_pixel = to_device(parts.float(), image.device).view(3, -1, 1, 1, 1)
    gray = gray_of(image)
    mean = of_mean * gray.mean((1, 2, 3), keepdim=True)
    image.lerp_(gray.mul_(of_pixel).add_(mean), weight).clamp_(0, 1)


def gray_of(image: Tensor) -> Tensor:
    """Return the gray of (N, 3, H, W): (N, 1, H, W)."""
    red, green, blue = image.split(1, dim=1)
    return (GRAY[0] * red).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def turn_hue(image: Tensor, turns: Tensor) -> Tensor:
    """Turn each image's hues in HSV, its saturation and value staying. (N, 3, H, W) in 0 .. 1."""
    red, green, blue = image.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    scale = span.clamp(min=1e-8).reciprocal_()  # a gray pixel has no hue, and no span to show one
    # the hue in sixths of a turn: 0 red, 2 green, 4 blue. Here lerp with a weight of 0 or 1
    # chooses: PyTorch's `where` takes fifteen times as long on a CPU
    sixths = (red - green).mul_(scale).add_(4)
    of_green, of_red = (blue - red).mul_(scale).add_(2), (green - blue).mul_(scale)
    chosen = torch.empty_like(sixths)
    sixths.lerp_(of_green, torch.eq(high, green, out=chosen))
    sixths.lerp_(of_red, torch.eq(high, red, out=chosen))
    sixths.add_(6 * turns.float().view(-1, 1, 1))
    sixths.sub_(6 * torch.mul(sixths, 1 / 6, out=chosen).floor_())  # into 0 .. 6
    result = torch.empty_like(image)
    for channel, middle in zip(result.unbind(1), (3, 2, 4), strict=True):
        share = torch.sub(sixths, middle, out=channel).abs_()
        share = share.sub_(1) if middle == 3 else share.neg_().add_(2)
        share.clamp_(0, 1).mul_(span).add_(low)
    return result
