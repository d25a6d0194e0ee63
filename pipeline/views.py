"""One view of an image: a window and a flip for image and saliency alike, then photometric jitter.

All of it runs in the DALI graph, on the graph's device. The `if`s are DALI conditionals: operators
below one run only for the samples of a batch that drew True.

Against torchvision, which MoCo v2 uses: brightness and contrast (about the view's mean gray) and
saturation are the same formulas; they come in one fixed order instead of a random one, and hue
turns the colours linearly about the gray axis, not in HSV.
"""

from typing import Any, NamedTuple

from nvidia.dali import fn, types

from pipeline.recipes import Range, Recipe

GRAY = (0.299, 0.587, 0.114)
"""Weights of R, G, B in gray (ITU-R BT.601, as in PIL, torchvision and DALI)."""


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


def uniform(limits: Range) -> Any:
    low, high = limits
    # DALI refuses a range without width; a recipe may fix a number
    return low + (high - low) * fn.random.uniform(range=[0.0, 1.0])


def around_one(change: float) -> Any:
    return uniform((1 - change, 1 + change))


def photometric(view: Any, recipe: Recipe) -> Any:
    """Colour jitter, grayscale and soft blur, in MoCo v2's order.

    uint8 HWC -> float32 HWC, both 0 .. 255: DALI blurs float images on a CPU in half the time.
    """
    if fn.random.coin_flip(probability=recipe.jitter_probability, dtype=types.BOOL):
        # operators take their arguments from the host
        mean = fn.reductions.mean(view, axes=[0, 1]).cpu()
        view = fn.brightness_contrast(
            view,
            brightness=around_one(recipe.brightness),
            contrast=around_one(recipe.contrast),
            contrast_center=fn.reductions.sum(mean * types.Constant(GRAY)),
        )
        view = fn.hsv(
            view,
            saturation=around_one(recipe.saturation),
            hue=uniform((-360 * recipe.hue, 360 * recipe.hue)),  # degrees
        )
    if fn.random.coin_flip(probability=recipe.grayscale_probability, dtype=types.BOOL):
        view = fn.hsv(view, saturation=0.0)
    view = fn.cast(view, dtype=types.FLOAT)
    if fn.random.coin_flip(probability=recipe.soft_blur_probability, dtype=types.BOOL):
        view = fn.gaussian_blur(view, sigma=uniform(recipe.soft_blur_sigma))
    return view
