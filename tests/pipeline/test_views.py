"""Views against PIL and torchvision: one window for image and saliency, jitter, filters, fills."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from pipeline import Batch, MaskedViews, Recipe
from pipeline.assemble import MEAN, STD
from schemas import Sample, ShardDataset
from tests.pipeline.conftest import CROP, STILL, Write, picture, sample_of, small

EXTRAS = ("masks", "saliency", "windows", "keys")


def first(dataset: ShardDataset, recipe: Recipe, batch_size: int = 40) -> Batch:
    views = MaskedViews(dataset.url, recipe, batch_size, device="cpu", report=EXTRAS)
    return next(iter(views))


def pixels_of(view: Tensor) -> Tensor:
    """Normalised (N, 3, H, W) -> 0 .. 255."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return 255 * (view * std + mean)


def cut_by_pil(pixels: np.ndarray, window: Tensor, side: int) -> np.ndarray:
    """Crop, resize and flip, as torchvision does to a PIL image."""
    y0, x0, y1, x1 = window.tolist()
    height, width = pixels.shape[:2]
    left, right = sorted((round(x0 * width), round(x1 * width)))
    box = (left, round(y0 * height), right, round(y1 * height))
    view = Image.fromarray(pixels).crop(box).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(view)[:, ::-1] if x0 > x1 else np.asarray(view)


def grid_of(view: Tensor) -> np.ndarray:
    """The mean gray of each of the 7 x 7 cells of a (3, H, W) view."""
    gray = (view * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    return gray.reshape(7, CROP // 7, 7, CROP // 7).mean((1, 3)).numpy()


def test_a_view_is_the_window_of_its_image(
    dataset: ShardDataset, pictures: dict[str, np.ndarray]
) -> None:
    batch = first(dataset, small("none", **STILL))
    assert batch.sample_keys is not None
    flips = 0
    for view, windows in ((batch.query, batch.query_window), (batch.key, batch.key_window)):
        assert windows is not None
        for key, pixels, window in zip(batch.sample_keys, pixels_of(view), windows, strict=True):
            expected = cut_by_pil(pictures[key], window, CROP)
            difference = np.abs(pixels.permute(1, 2, 0).numpy() - expected)
            # PIL filters inside the crop only, DALI looks beyond its edge
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
        assert 0.77 < columns / rows < 1.3  # whole pixels
    assert 0.28 < min(areas) < 0.36
    assert 0.44 < max(areas) < 0.52


def rotated(sample: Sample, orientation: int) -> Sample:
    """The same sample, its pixels stored rotated and the EXIF tag saying how to turn them back."""
    pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
    # 6: turn clockwise to view, 3: turn by 180 degrees
    stored = np.rot90(pixels, {6: 1, 3: 2}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, format="JPEG", quality=95, exif=exif)
    return Sample(
        key=sample.key,
        image=buffer.getvalue(),
        extension="jpg",
        saliency=sample.saliency,
        label=sample.label,
        height=sample.height,
        width=sample.width,
    )


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_saliency_lies_on_its_image(write: Write, orientation: int) -> None:
    # each sample's saliency is its own gray
    samples = [sample_of(index, picture(index)) for index in range(16)]
    if orientation != 1:
        samples = [rotated(sample, orientation) for sample in samples]
    batch = first(write(samples), small("none", **STILL), batch_size=16)
    for view, saliency in ((batch.query, batch.query_saliency), (batch.key, batch.key_saliency)):
        assert saliency is not None
        agree, mirrored = [], []
        for pixels, grid in zip(pixels_of(view), saliency.numpy(), strict=True):
            agree.append(np.corrcoef(grid_of(pixels).ravel(), grid.ravel())[0, 1])
            mirrored.append(np.corrcoef(grid_of(pixels)[:, ::-1].ravel(), grid.ravel())[0, 1])
        assert min(agree) > 0.97
        assert np.mean(mirrored) < 0.5


def test_grayscale(dataset: ShardDataset) -> None:
    batch = first(dataset, small("none", **{**STILL, "grayscale_probability": 1.0}))
    plain = first(dataset, small("none", **STILL))
    assert torch.equal(batch.query_window, plain.query_window)  # type: ignore[arg-type]
    gray = pixels_of(batch.query)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    expected = (pixels_of(plain.query) * weights).sum(1, keepdim=True)
    assert (gray - expected).abs().max() < 2.5


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions_formula(dataset: ShardDataset, change: str) -> None:
    # one factor at a time: each pixel lies on the line from `centre` through the plain pixel
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    settings = {**STILL, **still, "jitter_probability": 1.0, change: 0.4}
    changed = pixels_of(first(dataset, small("none", **settings)).query).double()
    plain = pixels_of(first(dataset, small("none", **STILL)).query).double()
    gray = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    centre = {
        "brightness": torch.zeros(()),
        "contrast": gray.mean((1, 2, 3), keepdim=True),
        "saturation": gray,
    }[change]
    inside = (changed > 1) & (changed < 254)  # not clipped
    away, moved = (plain - centre) * inside, (changed - centre) * inside
    factor = (away * moved).sum((1, 2, 3)) / away.square().sum((1, 2, 3))
    assert 0.58 < factor.min() < 0.75
    assert 1.25 < factor.max() < 1.42
    error = (moved - factor[:, None, None, None] * away).abs()
    assert error.max() < 3


def test_soft_blur_only_where_drawn(dataset: ShardDataset) -> None:
    half = {**STILL, "soft_blur_probability": 0.5, "soft_blur_sigma": (2.0, 2.0)}
    plain = first(dataset, small("none", **STILL)).query
    blurred = first(dataset, small("none", **half)).query
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, blurred, strict=True)]
    assert 8 <= sum(same) <= 32  # of 40
    expected = gaussian_blur(plain, [13, 13], [2.0, 2.0])
    for kept, view, wanted in zip(same, blurred, expected, strict=True):
        assert kept or torch.allclose(view, wanted, atol=1e-3)


def unmasked(dataset: ShardDataset) -> Tensor:
    return first(dataset, small("none", **STILL)).query


def test_high_pass_is_torchvisions_on_the_normalised_view(dataset: ShardDataset) -> None:
    plain = unmasked(dataset)
    recipe = small("hp", **STILL)
    batch = first(dataset, recipe)
    assert batch.query_mask is not None
    expected = plain - gaussian_blur(plain, [11, 11], [5.0, 5.0])
    difference = (batch.query - expected).abs()
    assert difference[~batch.query_mask].max() < 1e-4
    assert difference[batch.query_mask].mean() > 0.01


def test_noise_replaces_what_is_masked_and_differs_by_sample(dataset: ShardDataset) -> None:
    batch = first(dataset, small("hp", **STILL))
    assert batch.query_mask is not None
    assert batch.hard_negative is not None
    assert batch.hard_negative_mask is not None
    for view, mask, deviation in (
        (batch.query, batch.query_mask, 0.18),
        (batch.hard_negative, batch.hard_negative_mask, 0.14),
    ):
        noise = view[mask]
        assert abs(noise.std() - deviation) < 0.01
        assert abs(noise.mean()) < 0.01
    # D9: no two samples of a batch share their noise
    one = {"query_ratio": (1.0, 1.0), "foreground_cap": None, "focal_probability": 0.0}
    full = first(dataset, small("hp", channel_probability=0.0, **one)).query.flatten(1)
    likeness = torch.corrcoef(full) - torch.eye(len(full))
    assert likeness.abs().max() < 0.4


def test_blur_fill_is_torchvisions(dataset: ShardDataset) -> None:
    plain = unmasked(dataset)
    batch = first(dataset, small("blur", **STILL))
    assert batch.query_mask is not None
    expected = torch.where(batch.query_mask, gaussian_blur(plain, [31, 31], [10.0, 10.0]), plain)
    assert batch.query_mask.any()
    assert torch.allclose(batch.query, expected, atol=1e-4)


def test_mean_fill_is_the_views_own_mean(dataset: ShardDataset) -> None:
    plain = unmasked(dataset)
    batch = first(dataset, small("mean", **STILL))
    assert batch.query_mask is not None
    mean = plain.double().mean((2, 3), keepdim=True).float()
    assert batch.query_mask.any()
    assert torch.allclose(batch.query, torch.where(batch.query_mask, mean, plain), atol=1e-5)


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
