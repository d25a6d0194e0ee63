"""One view of an image: one window and one flip that cut image and saliency alike.

Windows are drawn in the DALI graph. On a GPU the graph cuts as well; on a CPU PyTorch does, whose
antialiased resize of 8-bit images takes a fifth of the time of DALI's and gives the same pixels
within two levels of 255, but at the border: there DALI's filter looks over the window's edge.
"""

from typing import Any, NamedTuple

from nvidia.dali import fn, types
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.recipes import Recipe


class Window(NamedTuple):
    """A crop in relative coordinates: start and end, each (y, x); x runs backwards when flipped."""

    start: Any
    end: Any


def draw_window(shape: Any, recipe: Recipe) -> Window:
    """Draw a random resized crop and a flip for an oriented image of this (H, W, C)."""
    anchor, size = fn.random_crop_generator(
        shape,
        random_area=list(recipe.crop_area),
        random_aspect_ratio=list(recipe.crop_ratio),
    )
    extent = fn.cast(shape[:2], dtype=types.FLOAT)
    start, end = anchor / extent, (anchor + size) / extent
    flip = fn.random.coin_flip(probability=recipe.flip_probability) * types.Constant([0, 1])
    return Window(start + flip * (end - start), end + flip * (start - end))


def cut(image: Any, window: Window, side: int, **options: Any) -> Any:
    """Crop, resize to side x side (bilinear, antialiased) and flip, in one operator."""
    return fn.resize(
        image,
        roi_start=window.start,
        roi_end=window.end,
        roi_relative=True,
        size=[side, side],
        interp_type=types.INTERP_LINEAR,
        **options,
    )


def cut_saliency(saliency: Any, window: Window, recipe: Recipe) -> Any:
    """The view's own saliency: (side, side, 1) uint8 over the image -> (grid, grid, 1) float32."""
    return cut(saliency, window, recipe.grid, dtype=types.FLOAT)


def cut_on_host(image: Tensor, window: Tensor, side: int) -> Tensor:
    """What `cut` does, on the host.

    Args:
        image: (H, W, 3) uint8. window: (4,) y0 x0 y1 x1 as shares of the image.

    Returns:
        (3, side, side) uint8.
    """
    height, width = image.shape[:2]
    y0, x0, y1, x1 = window.tolist()
    top, bottom = round(y0 * height), round(y1 * height)
    left, right = sorted((round(x0 * width), round(x1 * width)))
    crop = image[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
    resized = interpolate(crop, (side, side), mode="bilinear", antialias=True)[0]
    return resized.flip(2) if x0 > x1 else resized
