"""An independent reference of the pipeline: NumPy in float64, one view at a time.

It follows the formulas of the method and shares no code with `pipeline`; of a recipe it uses only
the numbers. Images are (H, W, 3) in 0 .. 1, or normalized if the name says so.
"""

import math

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
GRAY = np.array([0.299, 0.587, 0.114])


def photometric(pixels: np.ndarray, parameters: dict, index: int) -> np.ndarray:
    """Apply MoCo v2's augmentation after the crop with the parameters of view `index`."""
    image = pixels.astype(np.float64) / 255
    for kind in np.asarray(parameters["order"][index]):
        if kind == 0:
            image = np.clip(image * float(parameters["brightness"][index]), 0, 1)
        elif kind == 1:
            factor, mean = float(parameters["contrast"][index]), (image @ GRAY).mean()
            image = np.clip(factor * image + (1 - factor) * mean, 0, 1)
        elif kind == 2:
            factor, gray = float(parameters["saturation"][index]), (image @ GRAY)[..., None]
            image = np.clip(factor * image + (1 - factor) * gray, 0, 1)
        else:
            image = turned(image, float(parameters["hue"][index]))
    if parameters["gray"][index]:
        image = np.repeat((image @ GRAY)[..., None], 3, axis=2)
    sigma = float(parameters["sigma"][index])
    return blurred(image, sigma, math.ceil(3 * sigma)) if sigma else image


def turned(image: np.ndarray, turns: float) -> np.ndarray:
    """Shift the hue by a fraction of the color circle, by the textbook formulas for HSV."""
    high, low = image.max(2), image.min(2)
    span = high - low
    red, green, blue = np.moveaxis(image, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        hue = np.select(
            [span == 0, high == red, high == green],
            [0.0, ((green - blue) / span) % 6, (blue - red) / span + 2],
            (red - green) / span + 4,
        )
    hue = (hue / 6 + turns) % 1 * 6
    part = hue % 1
    falling, rising = high - span * part, low + span * part
    cases = [
        (high, rising, low),
        (falling, high, low),
        (low, high, rising),
        (low, falling, high),
        (rising, low, high),
        (high, low, falling),
    ]
    sextant = np.minimum(np.floor(hue).astype(int), 5)
    channels = [np.choose(sextant, [case[channel] for case in cases]) for channel in range(3)]
    return np.stack(channels, axis=2)


def blurred(image: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Blur with a Gaussian of 2 radius + 1 taps; the border is reflected without the edge."""
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        border = [(radius, radius) if along == axis else (0, 0) for along in range(3)]
        padded = np.pad(image, border, mode="reflect")
        side = image.shape[axis]
        image = sum(
            weight * np.take(padded, range(tap, tap + side), axis)
            for tap, weight in enumerate(taps)
        )
    return image


def encoder_view(pixels: np.ndarray, parameters: dict, index: int, high_pass: bool) -> np.ndarray:
    """Return the unmasked view: normalized and, if requested, high-passed (kernel 11, sigma 5)."""
    view = (photometric(pixels, parameters, index) - MEAN) / STD
    return view - blurred(view, 5.0, 5) if high_pass else view


def filled(view: np.ndarray, mask: np.ndarray, fill: str) -> np.ndarray:
    """Fill masked pixels; noise, whose values are unknown, is NaN."""
    content = {
        "blur": lambda: blurred(view, 10.0, 15),
        "mean": lambda: np.broadcast_to(view.mean((0, 1)), view.shape),
        "noise": lambda: np.full_like(view, np.nan),
    }[fill]()
    return np.where(mask, content, view)


def foreground(saliency: np.ndarray) -> np.ndarray:
    """Find the foreground of one (7, 7) map by relaxed SCDA."""
    values = saliency.astype(np.float64)
    mean = sum(values.ravel()) / values.size
    variance = sum((value - mean) ** 2 for value in values.ravel()) / values.size
    return values >= mean - 0.6 * math.sqrt(variance)


def counts(ratio: float, front: int, cells: int, hard_negative: bool, cap: bool) -> tuple[int, int]:
    """Return the number of masked cells in foreground and background (docs/method.md)."""
    share = ratio * (front / cells)
    if cap and share >= 0.56:
        share = 0.55
    of_front = round(share * cells)
    if hard_negative:
        return of_front, 0
    return of_front, max(0, math.floor(cells * ratio) - of_front)
