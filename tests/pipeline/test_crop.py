"""Crop windows equal torchvision's RandomResizedCrop for all shapes, including its fallback."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipeline.crop import ATTEMPTS, compute_center_windows, draw_windows
from tests.pipeline.conftest import rng_of, small

TRIALS = 4000
SHAPES = [(224, 224), (300, 400), (300, 1200), (1200, 300), (37, 1000), (3, 5), (1, 1), (1, 9)]


def drawn(shape: tuple[int, int], trials: int = TRIALS, seed: int = 0, **changes: object):
    """Return integer windows (top, left, rows, columns) and flips."""
    height, width = (np.full(trials, side) for side in shape)
    rng = rng_of(trials, seed, "crop")
    windows = draw_windows(height, width, small("none", **changes), rng)
    assert windows.dtype == np.float32
    y0, x0, y1, x1 = windows.astype(np.float64).T
    pixels = np.stack([y0, y1, np.minimum(x0, x1), np.maximum(x0, x1)])
    pixels *= np.array([shape[0], shape[0], shape[1], shape[1]])[:, None]
    whole = np.rint(pixels)
    assert np.abs(pixels - whole).max() < 1e-3
    top, bottom, left, right = whole
    return np.stack([top, left, bottom - top, right - left], axis=1).astype(int), x0 > x1


def theirs(shape: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    return np.array(
        [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(TRIALS)]
    )


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_are_distributed_as_torchvisions(
    shape: tuple[int, int], scale: tuple[float, float]
) -> None:
    ours, flips = drawn(shape, crop_area=scale)
    assert abs(flips.mean() - 0.5) < 5.5 / 2 / TRIALS**0.5
    reference = theirs(shape, scale)
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()
    assert (ours[:, 2:] >= 1).all()
    for column in range(4):
        # two-sample Kolmogorov-Smirnov distance: exceeded in less than one of a million runs
        places = np.unique(np.concatenate([ours[:, column], reference[:, column]]))
        shares = [
            np.searchsorted(np.sort(sample[:, column]), places, side="right") / TRIALS
            for sample in (ours, reference)
        ]
        assert np.abs(shares[0] - shares[1]).max() < 2.7 * (2 / TRIALS) ** 0.5, column
    for one, other in ((2, 3), (0, 2), (1, 3), (0, 1)):
        # and the correlation of two of its numbers
        actual = [np.mean(s[:, one] * s[:, other] * 1.0) for s in (ours, reference)]
        spread = np.std(reference[:, one] * reference[:, other] * 1.0) * (2 / TRIALS) ** 0.5
        assert abs(actual[0] - actual[1]) <= 5.5 * spread + 1e-9


def test_a_very_wide_image_is_cut_at_its_center() -> None:
    ours, _ = drawn((32, 3000), crop_area=(0.5, 1.0))
    assert (ours == (0, 1478, 32, 43)).all()  # 4 : 3 at the full height, rounded up from 42.7
    tall, _ = drawn((3000, 32), crop_area=(0.5, 1.0))
    assert (tall == (1478, 0, 43, 32)).all()


def test_a_stream_serves_two_views_with_ten_tries_each() -> None:
    """The number of random words per window does not depend on the shape of the image."""
    rng = rng_of(5, purpose="crop")
    recipe, wide, square = small("none"), np.full(5, 3000), np.full(5, 50)
    draw_windows(square, wide, recipe, rng)
    second = draw_windows(square, square, recipe, rng)
    other = rng_of(5, purpose="crop")
    other.draw_words(2 * ATTEMPTS + 3)
    assert np.array_equal(second, draw_windows(square, square, recipe, other))


def test_center_windows() -> None:
    windows = compute_center_windows(np.array([100, 50]), np.array([100, 200]), 0.5)
    assert windows[0].tolist() == [0.25, 0.25, 0.75, 0.75]
    np.testing.assert_allclose(windows[1], [0.25, 0.4375, 0.75, 0.5625])
