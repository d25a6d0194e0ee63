"""All pixels of a view as one function for a compiler: jitter, blurs, high-pass, masks, fills.

`build_chain` returns the function for one recipe; `torch.compile` turns it into about ten GPU
kernels. It has no branch over samples: each one's parameters are numbers of one table, written by
`pack`. Images are (N, H, W, 3) in memory, as the decoder hands them out and as `channels_last`
networks read them.

An image's mean gray enters once, in contrast. So one pass over the 8-bit pixels computes what
comes before each sample's contrast and its mean, and a second pass computes all of it, again from
the 8-bit pixels: that is arithmetic instead of memory traffic. Each blur is one pass per axis; the
high-pass subtraction, the noise and the masks belong to the last pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.blur import build_shared_kernel, build_soft_blur_kernel, reflect
from pipeline.photometric import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, Photometric
from pipeline.recipes import Recipe

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of R, G, B in 0 .. 1, as in torchvision."""

STAGES = 4
COLUMNS = 5
"""Numbers per stage: weight, of_mean, of_pixel, turns, before (see `pack`)."""

FUSED_FILLS = ("noise", "blur", "mean")
"""Fills that are part of the compiled function."""

Planes = tuple[Tensor, Tensor, Tensor]
"""R, G and B, (N, H, W) each."""


class Cover(NamedTuple):
    """The mask of one masked copy of a view, and its noise.

    Attributes:
        cells: (N, C, h, w) bool, C 1 or 3.
        window: (N, H, W) bool or None. focal: (N,) bool: the window replaces the cells.
        noise: (N, 3, cell, cell) float32, standard normal; None where the fill is not noise.
        std: what the noise is multiplied with.
    """

    cells: Tensor
    window: Tensor | None
    focal: Tensor
    noise: Tensor | None
    std: float


Chain = Callable[[Tensor, Tensor, Sequence[Cover | None]], list[Tensor]]
"""(image (N, H, W, 3) uint8, table (N, columns), one cover per copy) -> (N, 3, H, W) float32 each,
channels_last; a copy without a cover is not masked."""


def soft_blur_radius(recipe: Recipe) -> int:
    """Return the radius in pixels of the recipe's widest soft blur, 0 where it has none."""
    if recipe.soft_blur_probability == 0:
        return 0
    sigma = torch.tensor(recipe.soft_blur_sigma[1], dtype=torch.float64)
    return int((3 * sigma).ceil())


def pack(look: Photometric, recipe: Recipe) -> Tensor:
    """Write the photometric parameters of N views as one table, on the host.

    Returns:
        (N, 4 * 5 + 1 + taps) float32: for each stage, first to last, the weight of the other image
        in a blend, whether that is the mean gray, whether it is the pixel's gray, the turns of hue
        and whether the stage comes before contrast; then whether the view becomes gray; then the
        taps of its soft blur.
    """
    size = len(look.gray)
    stages = torch.zeros(size, STAGES, COLUMNS, dtype=torch.float64)
    for kind, factor in (
        (BRIGHTNESS, look.brightness),
        (CONTRAST, look.contrast),
        (SATURATION, look.saturation),
    ):
        stages[..., 0] += (look.order == kind) * (1 - factor).unsqueeze(1)
    contrast = look.order == CONTRAST
    stages[..., 1] = contrast
    stages[..., 2] = look.order == SATURATION
    stages[..., 3] = (look.order == HUE) * look.hue.unsqueeze(1)
    stages[..., 4] = contrast.cumsum(1) == 0
    radius = soft_blur_radius(recipe)
    taps = torch.zeros(size, 2 * radius + 1)
    taps[:, radius] = 1
    rows = look.sigma > 0
    if rows.any():
        kernel = build_soft_blur_kernel(look.sigma[rows])
        margin = radius - kernel.shape[1] // 2
        taps[rows] = torch.nn.functional.pad(kernel, (margin, margin))
    return torch.cat([stages.flatten(1).float(), look.gray.float().unsqueeze(1), taps], 1)


def build_chain(recipe: Recipe) -> Chain:
    """Return the function of this recipe's pixels; it leaves out a fill outside `FUSED_FILLS`."""
    radius = soft_blur_radius(recipe)
    jitters, grays = recipe.jitter_probability > 0, recipe.grayscale_probability > 0
    fill, filters = recipe.fill, recipe.high_pass
    high_pass = build_shared_kernel(recipe.high_pass_kernel, recipe.high_pass_sigma)[0].tolist()
    strong = build_shared_kernel(recipe.blur_kernel, recipe.blur_sigma)[0].tolist()

    def chain(image: Tensor, table: Tensor, covers: Sequence[Cover | None]) -> list[Tensor]:
        planes = normalize(color(image, table, jitters, grays))
        view = torch.stack(planes, -1)
        if radius:
            taps = table[:, STAGES * COLUMNS + 1 :].view(len(table), -1, 1, 1, 1).unbind(1)
            view = blur(view, taps)
        if filters:
            view = view - blur(view, high_pass)
        content = view
        if any(cover is not None for cover in covers):
            if fill == "blur":
                content = blur(view, strong)
            elif fill == "mean":
                content = view.mean((1, 2), keepdim=True)
        return [
            (view if cover is None else masked(view, content, cover)).permute(0, 3, 1, 2)
            for cover in covers
        ]

    return chain


def color(image: Tensor, table: Tensor, jitters: bool, grays: bool) -> Planes:
    """Adjust brightness, contrast, saturation and hue in each view's order, then make some gray.

    Args:
        image: (N, H, W, 3) uint8. table: see `pack`. jitters, grays: whether any view needs it.

    Returns:
        R, G, B in 0 .. 1.
    """
    planes = split(image)
    if jitters:
        stages = table[:, : STAGES * COLUMNS].view(len(table), STAGES, COLUMNS, 1, 1)
        start = planes
        # contrast is one of four stages, so what comes before it is among the first three
        for stage in stages[:, :-1].unbind(1):
            planes = adjust(planes, stage * stage[:, -1:], 0.0)
        mean = gray_of(planes).mean((1, 2), keepdim=True)
        planes = start
        for stage in stages.unbind(1):
            planes = adjust(planes, stage, mean)
    if grays:
        becomes_gray = table[:, STAGES * COLUMNS].view(-1, 1, 1) > 0
        gray = gray_of(planes)
        red, green, blue = planes
        planes = (
            torch.where(becomes_gray, gray, red),
            torch.where(becomes_gray, gray, green),
            torch.where(becomes_gray, gray, blue),
        )
    return planes


def split(image: Tensor) -> Planes:
    """(N, H, W, 3) uint8 -> R, G, B in 0 .. 1."""
    red, green, blue = (image.select(-1, channel).float() / 255 for channel in range(3))
    return red, green, blue


def normalize(planes: Planes) -> Planes:
    """Subtract ImageNet's mean and divide by its standard deviation."""
    red, green, blue = (
        (plane - mean) / std for plane, mean, std in zip(planes, MEAN, STD, strict=True)
    )
    return red, green, blue


def gray_of(planes: Planes) -> Tensor:
    red, green, blue = planes
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def adjust(planes: Planes, stage: Tensor, mean: Tensor | float) -> Planes:
    """Apply one stage, (N, 5, 1, 1) of the table: a blend with another image, or a turn of hue."""
    weight, of_mean, of_pixel, turns = stage[:, :4].unbind(1)
    other = of_mean * mean + of_pixel * gray_of(planes)
    mixed = [(plane + weight * (other - plane)).clamp(0, 1) for plane in planes]
    red, green, blue = (
        torch.where(turns != 0, turned, plane)
        for turned, plane in zip(turn_hue(planes, turns), mixed, strict=True)
    )
    return red, green, blue


def turn_hue(planes: Planes, turns: Tensor) -> Planes:
    """Turn each image's hues in HSV; saturation and value stay. Planes in 0 .. 1."""
    red, green, blue = planes
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    scale = 1 / span.clamp(min=1e-8)  # a gray pixel has no hue, and no span to show one
    # the hue in sixths of a turn: 0 red, 2 green, 4 blue
    of_red, of_green = (green - blue) * scale, (blue - red) * scale + 2
    sixths = torch.where(high == green, of_green, (red - green) * scale + 4)
    sixths = torch.where(high == red, of_red, sixths) + 6 * turns
    sixths = sixths - 6 * (sixths * (1 / 6)).floor()
    shares = (sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()
    red, green, blue = (share.clamp(0, 1) * span + low for share in shares)
    return red, green, blue


def blur(view: Tensor, taps: Sequence[Tensor | float]) -> Tensor:
    """Convolve the rows and columns of (N, H, W, 3), the border reflected.

    Args:
        taps: numbers, or (N, 1, 1, 1) each.
    """
    radius = len(taps) // 2
    for axis in (2, 1):
        side = view.shape[axis]
        place = torch.arange(side, device=view.device)
        terms = (
            weight * view.index_select(axis, reflect(place + offset, side))
            for offset, weight in zip(range(-radius, radius + 1), taps, strict=True)
        )
        view = functools.reduce(torch.add, terms)
    return view


def masked(view: Tensor, content: Tensor, cover: Cover) -> Tensor:
    """Replace the masked pixels of (N, H, W, 3) by the content, or by noise where there is some."""
    _, height, width, channels = view.shape
    cells = cover.cells.permute(0, 2, 3, 1)
    size, rows, columns, depth = cells.shape
    shape = (size, rows, height // rows, columns, width // columns, depth)
    where = cells[:, :, None, :, None].expand(shape).reshape(size, height, width, depth)
    if cover.window is not None:
        where = torch.where(cover.focal.view(-1, 1, 1, 1), cover.window.unsqueeze(-1), where)
    if cover.noise is not None:
        tile = cover.noise.permute(0, 2, 3, 1)
        cell = tile.shape[1]
        shape = (size, height // cell, cell, width // cell, cell, channels)
        content = cover.std * tile[:, None, :, None].expand(shape).reshape(view.shape)
    return torch.where(where, content, view)
