"""Tests of windows that cover an image, and of pasting their maps into one map."""

import numpy as np
import pytest
import torch
from PIL import Image

from precompute.estimators import ScdaOptions
from precompute.estimators.windows import Window, cut, list_windows, paste, repeat_images
from tests.conftest import noise
from tests.precompute.conftest import batch


def test_areas_are_averaged_after_z_scoring() -> None:
    def estimate(*areas: float) -> np.ndarray:
        options = ScdaOptions("resnet18", "random", size=64, areas=areas, precision="fp32")
        return options.build()(batch(noise(0), noise(1)))

    assert np.allclose(estimate(1.0, 0.3), (estimate(1.0) + estimate(0.3)) / 2, atol=1e-4)


SHAPES = [(40, 56), (500, 375), (1, 1), (1, 1000), (1000, 3), (33, 2000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("area", [1.0, 0.45, 0.1])
def test_windows_cover_the_image_and_stay_inside(shape: tuple[int, int], area: float) -> None:
    found = list_windows(*shape, area)
    cover = np.zeros(shape, int)
    for top, left, height, width in found:
        assert top >= 0 <= left
        assert top + height <= shape[0]
        assert left + width <= shape[1]
        cover[top : top + height, left : left + width] += 1
    assert cover.min() >= 1
    assert len(found) <= 64
    if area == 1.0:
        assert found == ((0, 0, *shape),)


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_a_ramp_are_pasted_to_that_ramp(shape: tuple[int, int]) -> None:
    """Each window's map samples a ramp over the image at the centers of its 7 x 7 cells."""
    height, width = shape
    maps = []
    for top, left, h, w in list_windows(*shape, 0.3):
        y = (top + (np.arange(7) + 0.5) / 7 * h) / height
        x = (left + (np.arange(7) + 0.5) / 7 * w) / width
        maps.append(2 * y[:, None] + 3 * x[None])
    pasted = paste(torch.tensor(np.array(maps)).float(), [shape], 0.3, 14)[0].numpy()
    middle = (np.arange(14) + 0.5) / 14
    expected = 2 * middle[:, None] + 3 * middle[None]
    # a map has no information beyond the centers of its outermost cells
    assert abs(pasted - expected)[3:-3, 3:-3].max() < 0.1
    assert abs(pasted - expected).max() < 0.5


def test_a_window_is_what_pillow_cuts_out() -> None:
    pixels = noise(0, 300, 400)
    window = Window(37, 60, 200, 240)
    found = cut(batch(pixels), [(0, window)], 224)[0].numpy().astype(int)
    box = (window.left, window.top, window.left + window.width, window.top + window.height)
    expected = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR, box=box)
    assert abs(found - np.asarray(expected, int)).max() <= 2


def test_images_are_repeated_in_any_order_without_a_copy() -> None:
    images = batch(noise(0, 3, 5), noise(1, 7, 2))
    repeated = repeat_images(images, [1, 0, 1])
    for tensor, index in zip(repeated.tensors.tolist(), [1, 0, 1], strict=True):
        pixels = np.asarray(tensor)
        assert np.array_equal(pixels, noise(index, *((7, 2) if index else (3, 5))))
        assert pixels.ctypes.data == np.asarray(images.tensors[index]).ctypes.data
    assert repeated.layout == images.layout


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300)])
def test_windows_have_their_share_of_an_image_that_is_not_square(height: int, width: int) -> None:
    windows = list_windows(height, width, 0.45)
    assert {(window.height, window.width) for window in windows} == {(232, 232)}
    assert len(windows) == 2 * 4  # at most a third of a side apart
