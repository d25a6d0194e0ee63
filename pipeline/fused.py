"""One function for all pixels of a view, to be compiled: jitter, blurs, high-pass, masks, fills.

`build_chain` returns the function for one recipe; `torch.compile` turns it into fewer than ten
GPU kernels a view. It does not branch on samples: their parameters are the rows of a table (see
`pack_parameters`). Images are (N, H, W, 3) in memory, as the decoder returns them and as
`channels_last` networks read them.

The mean gray of an image is needed only for contrast. So one pass over the 8-bit pixels applies the
adjustments before contrast and computes the mean, and a second pass applies all of them, again from
the 8-bit pixels: this trades memory traffic for arithmetic. Each blur is one pass per axis; the
high-pass subtraction, the noise and the masks are part of the last pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.blur import build_shared_kernel, build_soft_blur_kernel, reflect
from pipeline.masks import Windows
from pipeline.photometric import BRIGHTNESS, CONTRAST, GRAY, HUE, SATURATION, Photometric
from pipeline.recipes import SOFT_BLUR_SIGMAS, Recipe

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of R, G, B in 0 .. 1, as in torchvision."""

STAGES = 4
COLUMNS = 5
"""Columns of the table per stage: weight, of_mean, of_pixel, turns, before (`pack_parameters`)."""

FUSED_FILLS = ("noise", "blur", "mean")
"""Fills that are part of the compiled function."""

Planes = tuple[Tensor, Tensor, Tensor]
"""R, G and B, each (N, H, W)."""


class FusedMasking(NamedTuple):
    """Masks and noise of a `pixels.Masking`, as the compiled function takes them.

    Attributes:
        cells: (N, C, h, w) bool, C 1 or 3.
        windows: focal windows or None. focal: (N,) bool, True where they replace the cells.
        noise: (N, 3, cell, cell) float32, standard normal; None unless the fill is noise.
        std: standard deviation of the noise, in normalized units.
    """

    cells: Tensor
    windows: Windows | None
    focal: Tensor
    noise: Tensor | None
    std: float


Chain = Callable[[Tensor, Tensor, Sequence[FusedMasking | None]], list[Tensor]]
"""Signature: (image, table, maskings) -> one (N, 3, H, W) float32 tensor per masking.

image: (N, H, W, 3) uint8. table: (N, columns), see `pack_parameters`. maskings: one per copy, None
for a copy that is not masked. The results are channels_last."""


def compute_soft_blur_radius(recipe: Recipe) -> int:
    """Return the radius in pixels of the recipe's widest soft blur, 0 if it has none."""
    if recipe.soft_blur_probability == 0:
        return 0
    sigma = torch.tensor(recipe.soft_blur_sigma[1], dtype=torch.float64)
    return int((SOFT_BLUR_SIGMAS * sigma).ceil())


def pack_parameters(parameters: Photometric, recipe: Recipe) -> Tensor:
    """Write the photometric parameters of N views into a table on the host.

    Returns:
        (N, 4 * 5 + 1 + taps) float32. For each stage, from first to last: the weight of the other
        image in a blend, 1 if that image is the mean gray, 1 if it is the pixel's gray, the turns
        of hue, and 1 if the stage comes before contrast. Then 1 if the view becomes gray, and the
        taps of its soft blur.
    """
    size = len(parameters.gray)
    stages = torch.zeros(size, STAGES, COLUMNS, dtype=torch.float64)
    for kind, factor in (
        (BRIGHTNESS, parameters.brightness),
        (CONTRAST, parameters.contrast),
        (SATURATION, parameters.saturation),
    ):
        stages[..., 0] += (parameters.order == kind) * (1 - factor).unsqueeze(1)
    contrast = parameters.order == CONTRAST
    stages[..., 1] = contrast
    stages[..., 2] = parameters.order == SATURATION
    stages[..., 3] = (parameters.order == HUE) * parameters.hue.unsqueeze(1)
    stages[..., 4] = contrast.cumsum(1) == 0
    radius = compute_soft_blur_radius(recipe)
    taps = torch.zeros(size, 2 * radius + 1)
    taps[:, radius] = 1
    rows = parameters.sigma > 0
    if rows.any():
        kernel = build_soft_blur_kernel(parameters.sigma[rows])
        margin = radius - kernel.shape[1] // 2
        taps[rows] = torch.nn.functional.pad(kernel, (margin, margin))
    return torch.cat([stages.flatten(1).float(), parameters.gray.float().unsqueeze(1), taps], 1)


def build_chain(recipe: Recipe) -> Chain:
    """Return the function for the pixels of this recipe; it applies only fills in `FUSED_FILLS`."""
    radius = compute_soft_blur_radius(recipe)
    has_jitter, has_gray = recipe.jitter_probability > 0, recipe.grayscale_probability > 0
    fill, has_high_pass = recipe.fill, recipe.high_pass
    high_pass = build_shared_kernel(recipe.high_pass_kernel, recipe.high_pass_sigma)[0].tolist()
    strong = build_shared_kernel(recipe.blur_kernel, recipe.blur_sigma)[0].tolist()

    def chain(
        image: Tensor, table: Tensor, maskings: Sequence[FusedMasking | None]
    ) -> list[Tensor]:
        planes = normalize(augment_colors(image, table, has_jitter, has_gray))
        view = torch.stack(planes, -1)
        if radius:
            taps = table[:, STAGES * COLUMNS + 1 :].view(len(table), -1, 1, 1, 1).unbind(1)
            view = blur(view, taps)
        if has_high_pass:
            view = view - blur(view, high_pass)
        content = view
        if any(masking is not None for masking in maskings):
            if fill == "blur":
                content = blur(view, strong)
            elif fill == "mean":
                content = view.mean((1, 2), keepdim=True)
        return [
            (view if masking is None else fill_masked(view, content, masking)).permute(0, 3, 1, 2)
            for masking in maskings
        ]

    return chain


def augment_colors(image: Tensor, table: Tensor, has_jitter: bool, has_gray: bool) -> Planes:
    """Apply color jitter in each view's order of adjustments, then convert some views to gray.

    Args:
        image: (N, H, W, 3) uint8. table: see `pack_parameters`.
        has_jitter, has_gray: whether the recipe has color jitter and grayscale.

    Returns:
        R, G, B in 0 .. 1.
    """
    planes = split_channels(image)
    if has_jitter:
        stages = table[:, : STAGES * COLUMNS].view(len(table), STAGES, COLUMNS, 1, 1)
        start = planes
        # contrast is one of four stages, so those before it are among the first three
        for stage in stages[:, :-1].unbind(1):
            planes = apply_stage(planes, stage * stage[:, -1:], 0.0)
        mean = convert_to_gray(planes).mean((1, 2), keepdim=True)
        planes = start
        for stage in stages.unbind(1):
            planes = apply_stage(planes, stage, mean)
    if has_gray:
        is_gray = table[:, STAGES * COLUMNS].view(-1, 1, 1) > 0
        gray = convert_to_gray(planes)
        red, green, blue = planes
        planes = (
            torch.where(is_gray, gray, red),
            torch.where(is_gray, gray, green),
            torch.where(is_gray, gray, blue),
        )
    return planes


def split_channels(image: Tensor) -> Planes:
    """Split (N, H, W, 3) uint8 into R, G, B in 0 .. 1."""
    red, green, blue = (image.select(-1, channel).float() / 255 for channel in range(3))
    return red, green, blue


def normalize(planes: Planes) -> Planes:
    """Subtract ImageNet's mean and divide by its standard deviation."""
    red, green, blue = (
        (plane - mean) / std for plane, mean, std in zip(planes, MEAN, STD, strict=True)
    )
    return red, green, blue


def convert_to_gray(planes: Planes) -> Tensor:
    """Return the gray (N, H, W) of three channels."""
    red, green, blue = planes
    return GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue


def apply_stage(planes: Planes, stage: Tensor, mean: Tensor | float) -> Planes:
    """Apply one stage, (N, 5, 1, 1) of the table: a blend with another image or a hue rotation."""
    weight, of_mean, of_pixel, turns = stage[:, :4].unbind(1)
    target = of_mean * mean + of_pixel * convert_to_gray(planes)
    mixed = [(plane + weight * (target - plane)).clamp(0, 1) for plane in planes]
    red, green, blue = (
        torch.where(turns != 0, turned, plane)
        for turned, plane in zip(rotate_hue(planes, turns), mixed, strict=True)
    )
    return red, green, blue


def rotate_hue(planes: Planes, turns: Tensor) -> Planes:
    """Rotate the hues of planes in 0 .. 1; saturation and value (HSV) stay the same."""
    red, green, blue = planes
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    span = high - low
    # any finite scale does for gray pixels, because their span is 0
    scale = 1 / span.clamp(min=1e-8)
    # the hue in sixths of a turn: 0 red, 2 green, 4 blue
    of_red, of_green = (green - blue) * scale, (blue - red) * scale + 2
    sixths = torch.where(high == green, of_green, (red - green) * scale + 4)
    sixths = torch.where(high == red, of_red, sixths) + 6 * turns
    sixths = sixths - 6 * (sixths * (1 / 6)).floor()
    shares = (sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()
    red, green, blue = (share.clamp(0, 1) * span + low for share in shares)
    return red, green, blue


def blur(view: Tensor, taps: Sequence[Tensor | float]) -> Tensor:
    """Convolve the rows and columns of (N, H, W, 3), with a reflected border.

    Args:
        taps: numbers shared by all images, or (N, 1, 1, 1) tensors.
    """
    radius = len(taps) // 2
    for axis in (2, 1):
        side = view.shape[axis]
        position = torch.arange(side, device=view.device)
        terms = (
            weight * view.index_select(axis, reflect(position + offset, side))
            for offset, weight in zip(range(-radius, radius + 1), taps, strict=True)
        )
        view = functools.reduce(torch.add, terms)
    return view


def fill_masked(view: Tensor, content: Tensor, masking: FusedMasking) -> Tensor:
    """Replace the masked pixels of (N, H, W, 3) by the masking's noise, or by `content`."""
    _, height, width, channels = view.shape
    cells = masking.cells.permute(0, 2, 3, 1)
    size, rows, columns, depth = cells.shape
    shape = (size, rows, height // rows, columns, width // columns, depth)
    is_masked = cells[:, :, None, :, None].expand(shape).reshape(size, height, width, depth)
    if masking.windows is not None:
        window = masking.windows.to_pixels().unsqueeze(-1)
        is_masked = torch.where(masking.focal.view(-1, 1, 1, 1), window, is_masked)
    if masking.noise is not None:
        tile = masking.noise.permute(0, 2, 3, 1)
        cell = tile.shape[1]
        shape = (size, height // cell, cell, width // cell, cell, channels)
        content = masking.std * tile[:, None, :, None].expand(shape).reshape(view.shape)
    return torch.where(is_masked, content, view)
