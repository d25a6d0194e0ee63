"""Convert pictures of every Pillow mode to 8-bit RGB, without clipping their range."""

import numpy as np
from PIL import Image, ImageCms


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the picture as 8-bit RGB, dropping alpha as DALI does.

    Pillow itself clips 16-bit, 32-bit and float pixels to 0 .. 255, which makes most of them white
    or black, and does not convert L*a*b*. Here, 16-bit values are divided by 257, as DALI does. A
    32-bit or float picture does not define its white value: values within 0 .. 1 (floats only),
    0 .. 255 or 0 .. 65535 are assumed to span that range, and all others are stretched from their
    minimum to their maximum (our choice).
    """
    mode = picture.mode
    if mode.startswith("I;16"):
        return from_gray(np.asarray(picture).astype(np.float64) / 257)
    if mode == "I":
        return from_gray(scale_to_bytes(np.asarray(picture).astype(np.float64), (255, 65535)))
    if mode == "F":
        return from_gray(scale_to_bytes(np.asarray(picture).astype(np.float64), (1, 255, 65535)))
    if mode == "LAB":
        lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        converted = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
        if converted is None:
            raise ValueError("L*a*b* was not converted")
        return converted
    if mode == "La":
        picture = picture.convert("LA")
    return picture.convert("RGB")


def scale_to_bytes(values: np.ndarray, whites: tuple[int, ...]) -> np.ndarray:
    """Scale any values to 0 .. 255; infinities become the nearest limit, and NaN the lower one."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if low >= 0:
        for white in whites:
            if high <= white:
                return values * (255 / white)
    return (values - low) / ((high - low) or 1) * 255


def from_gray(values: np.ndarray) -> Image.Image:
    """Return (height, width) floats in 0 .. 255 as an RGB picture."""
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8)).convert("RGB")
