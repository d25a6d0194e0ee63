"""Photometric augmentation of MoCo v2 and SimCLR: colour jitter, grayscale, soft blur.

The formulas are those of torchvision's ColorJitter (each sample with its own factors, in an order
of its own, clamped after each adjustment), on floats: torchvision rounds PIL images to 8 bits in
between. The blur is a Gaussian cut at three sigma on either side; PIL's, which
MoCo v2 uses, is a threefold box that comes near it.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.blur import gaussian_blur, soft_blur_kernel
from pipeline.draws import Draws, to_device
from pipeline.recipes import Range, Recipe

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
        hue: (N,) float64, turns of the colour circle; 0 changes nothing.
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


def draw(size: int, recipe: Recipe, draws: Draws) -> Photometric:
    """Draw the parameters of `size` views."""

    def coin(probability: float) -> Tensor:
        return draws.on_host(size) < probability

    def between(limits: Range) -> Tensor:
        low, high = limits
        return low + (high - low) * draws.on_host(size)

    jittered = coin(recipe.jitter_probability)

    def factor(change: float) -> Tensor:
        return torch.where(jittered, between((1 - change, 1 + change)), 1.0)

    return Photometric(
        order=draws.on_host(size, 4).argsort(1),
        brightness=factor(recipe.brightness),
        contrast=factor(recipe.contrast),
        saturation=factor(recipe.saturation),
        hue=torch.where(jittered, between((-recipe.hue, recipe.hue)), 0.0),
        gray=coin(recipe.grayscale_probability),
        sigma=torch.where(coin(recipe.soft_blur_probability), between(recipe.soft_blur_sigma), 0.0),
    )


def apply(view: Tensor, drawn: Photometric) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in 0 .. 1."""
    image = view.permute(0, 3, 1, 2).contiguous().float().div_(255)
    for kind in drawn.order.unbind(1):
        blend(image, kind, drawn)
        for host, rows in groups((kind == HUE) & (drawn.hue != 0), image.device):
            turns = to_device(drawn.hue[host], image.device)
            image[rows] = turn_hue(image[rows], turns)
    if drawn.gray.any():
        weight = to_device(drawn.gray.float(), image.device).view(-1, 1, 1, 1)
        image.lerp_(gray_of(image), weight)
    for host, rows in groups(drawn.sigma > 0, image.device):
        image[rows] = gaussian_blur(image[rows], soft_blur_kernel(drawn.sigma[host]))
    return image


def groups(
    chosen: Tensor, device: torch.device
) -> list[tuple[slice, slice]] | list[tuple[Tensor, Tensor]]:
    """The chosen rows, as indices on the host and on the device: on a CPU one by one, as views."""
    rows = chosen.nonzero().squeeze(1)
    if device.type == "cpu":
        return [(slice(row, row + 1),) * 2 for row in rows.tolist()]
    return [(rows, to_device(rows, device))] if len(rows) else []


def blend(image: Tensor, kind: Tensor, drawn: Photometric) -> None:
    """Brightness, contrast or saturation in place, whichever `kind` (N,) says.

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
    """(N, 3, H, W) -> (N, 1, H, W)."""
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
