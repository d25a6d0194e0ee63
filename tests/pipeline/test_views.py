"""Views from the loader: windows against PIL, hard negatives, and the reported extras."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline import Batch, MaskedViews, Recipe
from pipeline.fused import MEAN, STD
from schemas import ShardDataset
from tests.pipeline.conftest import CROP, STILL, small

EXTRAS = ("masks", "saliency", "windows", "keys")


def first(dataset: ShardDataset, recipe: Recipe, batch_size: int = 40) -> Batch:
    views = MaskedViews(dataset.url, recipe, batch_size, device="cpu", report=EXTRAS)
    return next(iter(views))


def pixels_of(view: Tensor) -> Tensor:
    """Map normalized (N, 3, H, W) to 0 .. 255."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return 255 * (view * std + mean)


def cut_by_pil(pixels: np.ndarray, window: Tensor, side: int, how: Image.Resampling) -> np.ndarray:
    """Crop, resize and flip an image as torchvision does with PIL."""
    y0, x0, y1, x1 = window.tolist()
    height, width = pixels.shape[:2]
    left, right = sorted((round(x0 * width), round(x1 * width)))
    box = (left, round(y0 * height), right, round(y1 * height))
    view = Image.fromarray(pixels).crop(box).resize((side, side), how)
    return np.asarray(view)[:, ::-1] if x0 > x1 else np.asarray(view)


def grid_of(view: Tensor) -> np.ndarray:
    """Return the mean gray of each of the 7 x 7 cells of a (3, H, W) view."""
    gray = (view * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    return gray.reshape(7, CROP // 7, 7, CROP // 7).mean((1, 3)).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_is_the_window_of_its_image(
    dataset: ShardDataset, pictures: dict[str, np.ndarray], interpolation: str
) -> None:
    how = Image.Resampling[interpolation.upper()]
    batch = first(dataset, small("none", interpolation=interpolation, **STILL))
    assert batch.sample_keys is not None
    flips = 0
    for view, windows in ((batch.query, batch.query_window), (batch.key, batch.key_window)):
        assert windows is not None
        for key, pixels, window in zip(batch.sample_keys, pixels_of(view), windows, strict=True):
            expected = cut_by_pil(pictures[key], window, CROP, how)
            difference = np.abs(pixels.permute(1, 2, 0).numpy() - expected)
            # PIL filters only inside the crop, DALI reads beyond its edge
            assert difference[4:-4, 4:-4].max() < 3
            assert difference.mean() < 1
            flips += bool(window[1] > window[3])
    assert 20 <= flips <= 60  # of 80


def test_query_and_key_are_two_draws(dataset: ShardDataset) -> None:
    batch = first(dataset, small("none"))
    assert batch.query_window is not None
    assert (batch.query_window != batch.key_window).any(1).all()


def test_windows_keep_to_area_and_ratio(
    dataset: ShardDataset, pictures: dict[str, np.ndarray]
) -> None:
    recipe = small("none", crop_area=(0.3, 0.5), crop_ratio=(0.8, 1.25))
    batch = first(dataset, recipe)
    assert batch.query_window is not None
    assert batch.sample_keys is not None
    areas = []
    for key, (y0, x0, y1, x1) in zip(batch.sample_keys, batch.query_window.tolist(), strict=True):
        height, width = pictures[key].shape[:2]
        rows, columns = (y1 - y0) * height, abs(x1 - x0) * width
        areas.append((y1 - y0) * abs(x1 - x0))
        assert 0.77 < columns / rows < 1.3  # integer pixels
    assert 0.28 < min(areas) < 0.36
    assert 0.44 < max(areas) < 0.52


@pytest.mark.parametrize("name", ["hp", "blur", "mean"])
def test_a_hard_negative_is_its_own_key_masked(dataset: ShardDataset, name: str) -> None:
    batch = first(dataset, small(name))
    assert batch.hard_negative is not None
    assert batch.hard_negative_mask is not None
    kept = ~batch.hard_negative_mask
    assert torch.equal(batch.hard_negative[kept], batch.key[kept])
    assert (batch.hard_negative[~kept] != batch.key[~kept]).double().mean() > 0.9


def test_several_hard_negatives_are_draws_of_the_same_keys(dataset: ShardDataset) -> None:
    batch = first(dataset, small("mean", hard_negatives=3), batch_size=8)
    assert batch.hard_negative is not None
    assert batch.hard_negative_mask is not None
    assert batch.hard_negative.shape == (24, 3, CROP, CROP)
    kept = ~batch.hard_negative_mask
    assert torch.equal(batch.hard_negative[kept], torch.cat([batch.key] * 3)[kept])
    first_of, second_of = batch.hard_negative_mask[:8], batch.hard_negative_mask[8:16]
    assert (first_of != second_of).flatten(1).any(1).double().mean() > 0.8


def test_mscn_masks_both_views_and_makes_no_hard_negative(dataset: ShardDataset) -> None:
    batch = first(dataset, small("mscn"))
    assert batch.hard_negative is None
    assert batch.query_mask is not None
    assert batch.key_mask is not None
    assert batch.key_mask.any()
    assert (batch.query_mask != batch.key_mask).any()


def test_none_masks_nothing(dataset: ShardDataset) -> None:
    batch = first(dataset, small("none"))
    assert batch.hard_negative is None
    assert batch.query_mask is None
    assert batch.key_mask is None
