"""Crop windows and flips: one window per view, applied to both the image and its saliency.

Windows are drawn exactly as in torchvision's RandomResizedCrop: in integer pixels, with at most ten
attempts, and then the largest center crop whose aspect ratio is allowed.
"""

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.host_threads import get_threads, split_rows
from pipeline.recipes import Interpolation, Recipe
from pipeline.rng import Rng

ATTEMPTS = 10
"""Windows to try before the center crop is taken (torchvision.transforms.RandomResizedCrop)."""


def draw_windows(height: np.ndarray, width: np.ndarray, recipe: Recipe, rng: Rng) -> np.ndarray:
    """Draw a random resized crop and a flip for each of N images.

    Args:
        height, width: (N,) integers, sizes in pixels after the EXIF orientation is applied.

    Returns:
        (N, 4) float32, y0 x0 y1 x1 as fractions of the image; x0 > x1 if flipped.
    """
    size = len(height)
    area, aspect = rng.uniform_on_host(size, ATTEMPTS, 2).numpy().transpose(2, 0, 1)
    position = rng.uniform_on_host(size, 2).numpy()
    is_flipped = rng.uniform_on_host(size).numpy() < recipe.flip_probability

    low, high = recipe.crop_area
    pixels = (height * width)[:, None] * (low + (high - low) * area)
    low, high = np.log(recipe.crop_ratio)
    ratio = np.exp(low + (high - low) * aspect)  # width over height
    columns = np.rint(np.sqrt(pixels * ratio)).astype(np.int64)  # (N, ATTEMPTS)
    rows = np.rint(np.sqrt(pixels / ratio)).astype(np.int64)
    fits = (columns > 0) & (columns <= width[:, None]) & (rows > 0) & (rows <= height[:, None])
    first_fit = fits.argmax(1)[:, None]
    columns = np.take_along_axis(columns, first_fit, 1)[:, 0]
    rows = np.take_along_axis(rows, first_fit, 1)[:, 0]
    top = np.floor(position[:, 0] * (height - rows + 1)).astype(np.int64)
    left = np.floor(position[:, 1] * (width - columns + 1)).astype(np.int64)

    needs_center = ~fits.any(1)
    largest = find_largest_crop(height, width, recipe)
    rows, columns = np.where(needs_center, largest, (rows, columns))
    top = np.where(needs_center, (height - rows) // 2, top)
    left = np.where(needs_center, (width - columns) // 2, left)

    start, end = left / width, (left + columns) / width
    start, end = np.where(is_flipped, (end, start), (start, end))
    window = np.stack([top / height, start, (top + rows) / height, end], axis=1)
    return window.astype(np.float32)


def find_largest_crop(
    height: np.ndarray, width: np.ndarray, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width of the largest window whose aspect ratio the recipe allows."""
    low, high = recipe.crop_ratio
    rows = np.where(width / height < low, np.rint(width / low), height)
    columns = np.where(width / height > high, np.rint(height * high), width)
    # torchvision would return an empty crop of an image that is one pixel wide
    return np.maximum(rows, 1).astype(np.int64), np.maximum(columns, 1).astype(np.int64)


def compute_center_windows(height: np.ndarray, width: np.ndarray, fraction: float) -> np.ndarray:
    """Return center squares whose side is a fraction of each image's short side.

    Returns:
        (N, 4) float32, y0 x0 y1 x1 as fractions of the image.
    """
    side = fraction * np.minimum(height, width)
    y, x = side / height / 2, side / width / 2
    return np.stack([0.5 - y, 0.5 - x, 0.5 + y, 0.5 + x], axis=1).astype(np.float32)


class HostCrops:
    """The crops of a batch that the host's threads are making with `crop_on_host`.

    Args:
        images: N images, (H, W, 3) uint8.
        windows: (N, 4) float32, as from `draw_windows`.
        side, interpolation: see `crop_on_host`.
        pinned: allocate the crops in pinned memory, so that copies to a GPU are asynchronous.
    """

    def __init__(
        self,
        images: list[Tensor],
        windows: np.ndarray,
        side: int,
        interpolation: Interpolation = "bilinear",
        pinned: bool = False,
    ) -> None:
        shape = (len(images), side, side, 3)
        self._crops = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        pixels, windows_of = self._crops.numpy(), torch.from_numpy(windows)

        def crop_rows(rows: slice) -> None:
            for row in range(rows.start, rows.stop):
                crop = crop_on_host(images[row], windows_of[row], side, interpolation)
                pixels[row] = cv2.merge(list(crop.numpy()))

        self._parts = [get_threads().submit(crop_rows, rows) for rows in split_rows(len(images))]

    def wait(self) -> Tensor:
        """Return the crops when all are made: (N, side, side, 3) uint8."""
        for part in self._parts:
            part.result()
        return self._crops


def crop_on_host(
    image: Tensor, window: Tensor, side: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Crop, resize (antialiased) and flip one image with PyTorch.

    On a CPU this takes a fifth of the time of DALI's operator. The pixels agree within 2 of 255
    levels, except at the border, where DALI's filter reads beyond the edge of the window.

    Args:
        image: (H, W, 3) uint8. window: (4,) float32, as from `draw_windows`.

    Returns:
        (3, side, side) uint8.
    """
    height, width = image.shape[:2]
    y0, x0, y1, x1 = window.tolist()
    top, bottom = round(y0 * height), round(y1 * height)
    left, right = sorted((round(x0 * width), round(x1 * width)))
    crop = image[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
    resized = interpolate(crop, (side, side), mode=interpolation, antialias=True)[0]
    return resized.flip(2) if x0 > x1 else resized
