"""Regions that are painted into the images appear in both views at the reported boxes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import MaskedViews, regions
from schemas import Sample, ShardDataset, UserError, write_dataset
from tests.pipeline.conftest import CROP, rng_of, small, stored

BLUE, RED = (20, 30, 200), (230, 20, 20)
COUNT = 24


def sample_of(index: int, pixels: np.ndarray) -> Sample:
    """Return a sample whose file has one of the eight orientations and shows these pixels."""
    saliency = np.random.default_rng(index).random((28, 28), dtype=np.float32)
    return Sample(
        key=f"key-{index:03d}",
        image=stored(Image.fromarray(pixels), index % 8 + 1),
        extension="jpg",
        saliency=saliency,
        label=0,
        height=pixels.shape[0],
        width=pixels.shape[1],
    )


def views_of(folder, pictures, **changes):
    write_dataset(
        str(folder), (sample_of(*item) for item in enumerate(pictures)), name="t", classes=["a"]
    )
    still = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "soft_blur_probability": 0.0}
    recipe = small("maskco", regions=1, **still, **changes)
    report = ("crops", "windows", "keys", "masks")
    return next(iter(MaskedViews(str(folder), recipe, COUNT, "cpu", seed=3, report=report)))


def in_image(box, window):
    """Map a view's box to fractions of the image: (x0, y0, x1, y1), sorted."""
    y0, x0, y1, x1 = window.tolist()
    across = sorted(x0 + x / CROP * (x1 - x0) for x in (box[0].item(), box[2].item()))
    down = [y0 + y / CROP * (y1 - y0) for y in (box[1].item(), box[3].item())]
    return across[0], down[0], across[1], down[1]


def test_a_painted_region_is_where_both_views_say(tmp_path):
    random = np.random.default_rng(0)
    sizes = [tuple(random.integers(120, 200, 2)) for _ in range(COUNT)]
    plain = [np.full((h, w, 3), BLUE, np.uint8) for h, w in sizes]
    first = views_of(tmp_path / "plain", plain)
    painted = [pixels.copy() for pixels in plain]
    for row, key in enumerate(first.sample_keys):
        if not first.region_valid[row, 0]:
            continue
        index = int(key.removeprefix("key-"))
        boxes = [
            in_image(first.query_regions[row, 0], first.query_window[row]),
            in_image(first.key_regions[row, 0], first.key_window[row]),
        ]
        np.testing.assert_allclose(*boxes, atol=1e-4)  # the same part of the image
        height, width = sizes[index]
        x0, y0, x1, y1 = boxes[0]
        rows, columns = (
            slice(round(y0 * height), round(y1 * height)),
            slice(round(x0 * width), round(x1 * width)),
        )
        painted[index][rows, columns] = RED
    second = views_of(tmp_path / "painted", painted)
    assert second.sample_keys == first.sample_keys
    assert torch.equal(second.query_regions, first.query_regions)
    flipped = first.query_window[:, 1] > first.query_window[:, 3]
    assert 0 < flipped.sum() < COUNT
    assert first.region_valid.float().mean() > 0.8
    for row in range(COUNT):
        for name in ("query", "key"):
            crop = getattr(second, f"{name}_crop")[row].float()
            red = crop[0] > crop[2]
            if not first.region_valid[row, 0]:
                continue
            found_rows, found_columns = (red.any(dim) for dim in (1, 0))
            box = getattr(first, f"{name}_regions")[row, 0].tolist()
            actual = [
                found_columns.nonzero().min().item(),
                found_rows.nonzero().min().item(),
                found_columns.nonzero().max().item() + 1,
                found_rows.nonzero().max().item() + 1,
            ]
            # image pixels are up to half a view pixel, and painted boxes end at full pixels
            assert np.abs(np.subtract(actual, box)).max() < 1.6, (row, name)


def test_the_query_loses_its_regions_and_the_key_nothing(tmp_path):
    pictures = [np.random.default_rng(i).integers(0, 256, (150, 150, 3)) for i in range(COUNT)]
    batch = views_of(tmp_path / "d", [p.astype(np.uint8) for p in pictures])
    assert batch.key_mask is None
    assert batch.hard_negative is None
    center = torch.arange(CROP) + 0.5
    for row in range(COUNT):
        x0, y0, x1, y1 = batch.query_regions[row, 0]
        inside = ((center >= y0) & (center < y1))[:, None] & ((center >= x0) & (center < x1))
        expected = inside & batch.region_valid[row, 0]
        assert torch.equal(batch.query_mask[row, 0], expected)


def drawn(query, key, saliency=None, **changes):
    recipe = small("maskco", **changes)
    windows = (torch.tensor(window).repeat(64, 1) for window in (query, key))
    return regions.draw_regions(*windows, saliency, recipe, rng_of(64)), recipe


def test_salient_regions_without_masks(dataset: ShardDataset) -> None:
    recipe = small("none", regions=2, region_choice="salient")
    batch = next(iter(MaskedViews(dataset.url, recipe, 8, "cpu")))
    assert batch.query_regions is not None
    assert batch.query_regions.shape == (8, 2, 4)


def test_views_without_a_common_part_have_no_region():
    actual, recipe = drawn([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0])
    assert not actual.valid.any()
    assert (actual.query == torch.tensor([0.0, 0.0, CROP, CROP])).all()
    assert not actual.to_masks(recipe.crop_size).cells.any()


def test_regions_have_at_least_a_cell_and_stay_in_both_views():
    """Test an overlap of slightly more than one cell of the wider view."""
    actual, _ = drawn([0.0, 0.0, 0.6, 0.6], [0.5, 0.9, 1.0, 0.48])
    assert actual.valid.all()
    for boxes in (actual.query, actual.key):
        assert (boxes[..., 2:] - boxes[..., :2] >= CROP / 7 - 1e-3).all()
        assert boxes.min() > -1e-3
        assert boxes.max() < CROP + 1e-3
    assert actual.query[..., :2].std(dim=0).min() > 0.1  # they differ


def test_salient_regions_lie_where_the_saliency_is():
    saliency = torch.zeros(64, 7, 7)
    saliency[:, 1, 5] = 1.0  # its center is at (x, y) = (5.5, 1.5) cells
    window = [0.0, 0.0, 1.0, 1.0]

    def covers(choice):
        actual, _ = drawn(window, window, saliency, region_choice=choice, regions=3)
        x, y = 5.5 * CROP / 7, 1.5 * CROP / 7
        x0, y0, x1, y1 = actual.query.unbind(-1)
        return ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).float().mean().item()

    assert covers("salient") > 2 * covers("random")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": 0}, "regions is 0"),
        ({"branch": "both"}, "branch is both"),
        ({"region_extent": (0.0, 0.5)}, "region_extent is"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(small("maskco"), **changes)
