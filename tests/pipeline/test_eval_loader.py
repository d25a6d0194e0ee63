"""EvalViews yields every sample once, with the pixels of PIL's resize and center crop."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur, normalize

from pipeline import EvalViews
from pipeline.fused import MEAN, STD
from schemas import ShardDataset, UserError
from tests.pipeline.conftest import CROP, SAMPLES, count_threads_left_by


def by_pil(pixels: np.ndarray, resize: int) -> torch.Tensor:
    """Resize and center crop in one step; `resize` is the short side before the crop."""
    height, width = pixels.shape[:2]
    half = min(height, width) * CROP / resize / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    view = Image.fromarray(pixels).resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)
    values = torch.from_numpy(np.asarray(view) / 255).permute(2, 0, 1)
    return normalize(values, list(MEAN), list(STD))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 20), (1, 45), (2, 8), (4, 5)])
def test_every_sample_comes_once(dataset: ShardDataset, world_size: int, batch_size: int) -> None:
    labels, sizes = [], []
    for rank in range(world_size):
        views = EvalViews(dataset.url, batch_size, "cpu", rank, world_size, crop_size=CROP)
        batches = list(views)
        assert len(batches) == len(views)
        assert all(len(batch.image) == batch_size for batch in batches[:-1])
        labels += [label for batch in batches for label in batch.label.tolist()]
        sizes.append(sum(len(batch.image) for batch in batches))
    assert labels == dataset.samples["label"].to_pylist()  # in the order on disk
    assert sum(sizes) == SAMPLES
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("steps", [1, None])
def test_dalis_threads_end_with_an_iteration(dataset: ShardDataset, steps: int | None) -> None:
    views = EvalViews(dataset.url, 8, "cpu", crop_size=CROP)

    def read() -> None:
        assert len(list(itertools.islice(views, steps))) == (steps or len(views))

    assert count_threads_left_by(read) == 0


def test_images_are_the_center_of_the_resized_image(
    dataset: ShardDataset, pictures: dict[str, np.ndarray]
) -> None:
    views = EvalViews(dataset.url, SAMPLES, "cpu", crop_size=CROP)
    (batch,) = views
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert views.resize == 64
    for image, pixels in zip(batch.image, pictures.values(), strict=True):
        difference = (image - by_pil(pixels, 64)).abs()
        # PIL filters inside the crop only; one 8-bit step is 0.018
        assert difference[:, 2:-2, 2:-2].max() < 0.04


def test_a_high_pass_recipe_filters_the_images(dataset: ShardDataset) -> None:
    (plain,) = EvalViews(dataset.url, SAMPLES, "cpu", crop_size=CROP)
    (filtered,) = EvalViews(dataset.url, SAMPLES, "cpu", crop_size=CROP, recipe="hp")
    expected = plain.image - gaussian_blur(plain.image, [11, 11], [5.0, 5.0])
    assert torch.allclose(filtered.image, expected, atol=1e-4)


def test_iterating_again_gives_the_same(dataset: ShardDataset) -> None:
    views = EvalViews(dataset.url, 20, "cpu", crop_size=CROP)
    first = next(iter(views))
    again = next(iter(views))
    assert torch.equal(first.image, again.image)


def test_more_ranks_than_samples_are_refused(dataset: ShardDataset) -> None:
    with pytest.raises(UserError, match="45 samples are too few for 50 ranks"):
        EvalViews(dataset.url, 20, "cpu", world_size=50)


def test_a_crop_above_the_resized_image_is_refused(dataset: ShardDataset) -> None:
    with pytest.raises(UserError, match="crop 56 of 50 pixels"):
        EvalViews(dataset.url, 20, "cpu", resize=50, crop_size=CROP)
