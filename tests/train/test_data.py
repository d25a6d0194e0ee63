"""Synthetic batches have all fields that a recipe promises."""

from dataclasses import replace

import pytest
import torch

import train.trainer
from pipeline.recipes import RECIPES
from tests.train.runs import config, metrics
from train.data import SyntheticViews, split_batch
from train.methods import MaskCoConfig

CPU = torch.device("cpu")


def made_up(name: str, **changes):
    recipe = replace(RECIPES[name], crop_size=56, **changes)
    return next(iter(SyntheticViews(8, recipe, 4, CPU, 1, seed=0)))


@pytest.mark.parametrize("count", [1, 3])
def test_regions_are_boxes_inside_the_views(count):
    batch = made_up("maskco", regions=count)
    assert batch.region_valid.shape == (4, count)
    assert batch.region_valid.dtype == torch.bool
    assert batch.region_valid.all()
    for boxes in (batch.query_regions, batch.key_regions):
        assert boxes.shape == (4, count, 4)
        assert boxes.dtype == torch.float32
        assert boxes.min() >= 0
        assert boxes.max() <= 56
        torch.testing.assert_close(boxes[..., 2:] - boxes[..., :2], torch.full((4, count, 2), 28.0))
    assert not torch.equal(batch.query_regions, batch.key_regions)


def test_without_regions_there_are_none():
    batch = made_up("hp")
    assert batch.query_regions is batch.key_regions is batch.region_valid is None


def test_micro_batches_have_the_regions_of_their_own_images():
    batch = made_up("maskco")
    for number, micro_batch in enumerate(split_batch(batch, 2)):
        rows = slice(2 * number, 2 * number + 2)
        for name in ("query", "key", "query_regions", "key_regions", "region_valid"):
            assert torch.equal(getattr(micro_batch, name), getattr(batch, name)[rows]), name


@pytest.mark.slow
def test_maskco_trains_on_synthetic_batches(tmp_path):
    settings = config(
        "", tmp_path, synthetic=20, recipe=RECIPES["maskco"], method=MaskCoConfig(queue=20),
        crop_size=56, epochs=1, log_steps=1,
    )  # fmt: skip
    train.trainer.train(settings)
    assert [row["regions_valid"] for row in metrics(tmp_path)] == [1, 1]
