"""Make views on a CPU with OpenCV, one by one.

A view depends on its own crop alone, so it is the same bit for bit whatever the batch and the
number of threads. Images are (H, W, 3) float32 arrays, which is the memory layout of a
channels_last tensor. Adjustments that are affine in the color of a pixel are 3 x 4 matrices.
"""

import math

import cv2
import numpy as np

from pipeline.blur import blur_on_cpu
from pipeline.fused import MEAN, STD
from pipeline.masks import Masks
from pipeline.photometric import CONTRAST, GRAY, HUE, SATURATION, ViewPhotometric
from pipeline.recipes import SOFT_BLUR_SIGMAS, Recipe

IDENTITY = np.eye(3, 4)
TO_GRAY = np.pad(np.tile(GRAY, (3, 1)), ((0, 0), (0, 1)))
"""The matrix that turns a color into gray."""
NORMALIZE, NORMALIZE_GRAY = (
    (colors - np.pad(np.array(MEAN)[:, None], ((0, 0), (3, 0)))) / np.array(STD)[:, None]
    for colors in (IDENTITY, TO_GRAY)
)
"""The matrices that normalize each channel by ImageNet's mean and standard deviation."""
DEGREES = 360
"""Full turn of the hue in OpenCV's float HSV images."""


def make_view(crop: np.ndarray, parameters: ViewPhotometric, recipe: Recipe) -> np.ndarray:
    """Make the encoder's input of one view, unmasked: jitter, normalization, blur, high-pass.

    Args:
        crop: (H, W, 3) uint8.
    """
    image = jitter_colors(to_floats(crop), parameters)
    image = cv2.transform(image, NORMALIZE_GRAY if parameters.gray else NORMALIZE)
    if parameters.sigma:  # this blur commutes with gray and normalization
        image = blur_on_cpu(image, math.ceil(SOFT_BLUR_SIGMAS * parameters.sigma), parameters.sigma)
    if recipe.high_pass:
        image -= blur_on_cpu(image, recipe.high_pass_kernel // 2, recipe.high_pass_sigma)
    return image


def to_floats(crop: np.ndarray) -> np.ndarray:
    """Convert uint8 to float32 in 0 .. 1, contiguous."""
    image = crop.astype(np.float32, order="C")
    image /= 255
    return image


def jitter_colors(image: np.ndarray, parameters: ViewPhotometric) -> np.ndarray:
    """Adjust brightness, contrast, saturation and hue in the order of this view.

    An adjustment by the factor f gives f x + (1 - f) y, clamped to 0 .. 1, where y is black, the
    view's mean gray or the pixel's own gray.
    """
    for kind in parameters.order:
        if kind == HUE:
            if parameters.hue:
                image = rotate_hue(image, parameters.hue)
            continue
        factor = parameters.factors[kind]
        if factor == 1:
            continue
        matrix = factor * IDENTITY
        if kind == CONTRAST:
            matrix[:, 3] = (1 - factor) * np.dot(GRAY, cv2.mean(image)[:3])
        elif kind == SATURATION:
            matrix += (1 - factor) * TO_GRAY
        image = cv2.transform(image, matrix)
        np.clip(image, 0, 1, out=image)
    return image


def rotate_hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Rotate the hues; saturation and value (HSV) stay the same."""
    hsv: np.ndarray = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 0] += DEGREES * (turns % 1)  # OpenCV takes hues above 360, but none below 0
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def build_pixel_mask(masks: Masks, row: int, side: int) -> np.ndarray:
    """Return the mask of one view, uint8, 1 where filled and 0 elsewhere.

    It is (side, side), or (side, side, 3) if the channels of the view have different masks.
    """
    if masks.windows is not None and masks.focal[row]:
        return masks.windows.select(slice(row, row + 1)).to_pixels()[0].numpy().view(np.uint8)
    cells = masks.cells[row].numpy().view(np.uint8)
    if (cells == cells[0]).all():
        cells = cells[:1]
    planes = [repeat_cells(plane, side) for plane in cells]
    return planes[0] if len(planes) == 1 else cv2.merge(planes)


def repeat_cells(cells: np.ndarray, side: int) -> np.ndarray:
    """Enlarge (h, w) cells to (side, side) pixels."""
    height, width = cells.shape
    size = (height, side // height, width, side // width)
    return np.broadcast_to(cells[:, None, :, None], size).reshape(side, side)


def write_masked(view: np.ndarray, mask: np.ndarray, content: np.ndarray, out: np.ndarray) -> None:
    """Write a view to `out`, with `content` where the mask is not 0.

    Args:
        view, out: (H, W, 3) float32.
        mask: (H, W) or (H, W, 3) uint8.
        content: (h, w, 3) float32, repeated over the view; h and w divide H and W.
    """
    out[...] = view
    rows, columns = view.shape[0] // content.shape[0], view.shape[1] // content.shape[1]
    written = cv2.copyTo(cv2.repeat(content, rows, columns), mask, out)
    assert written is out, "OpenCV writes in place only if type and size are equal"
