"""Masks against plain Python and NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from pipeline import RECIPES, masks
from pipeline.recipes import Recipe

CELLS = 49


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saliency(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 7, 7, generator=generator(seed)) * 255


def front_of(maps: torch.Tensor, margin: float = 0.6) -> np.ndarray:
    """Relaxed SCDA, one map at a time in float64."""
    values = maps.numpy().astype(np.float64)
    return np.stack([one >= one.mean() - margin * one.std(ddof=0) for one in values])


def cells_of(pixels: torch.Tensor, cell: int) -> np.ndarray:
    """(N, 3, H, W) pixel masks -> (N, 3, 7, 7), after checking that each cell is one value."""
    count, channels, side, _ = pixels.shape
    blocks = pixels.reshape(count, channels, side // cell, cell, side // cell, cell)
    full, any_ = blocks.all(5).all(3), blocks.any(5).any(3)
    assert torch.equal(full, any_), "a cell is masked in part"
    return full.numpy()


def expected_counts(ratio: float, front: int, role: str, recipe: Recipe) -> tuple[int, int]:
    share = ratio * front / CELLS
    if recipe.foreground_cap and share >= recipe.foreground_cap[0]:
        share = recipe.foreground_cap[1]
    of_front = round(share * CELLS)
    if role == "hard_negative":
        return of_front, 0
    return of_front, max(0, math.floor(CELLS * ratio) - of_front)


def test_foreground_is_relaxed_scda() -> None:
    maps = saliency(500)
    assert np.array_equal(masks.foreground(maps, 0.6).numpy(), front_of(maps))


@pytest.mark.parametrize("value", [0.0, 0.3, 254.99])
def test_a_constant_map_is_all_foreground(value: float) -> None:
    assert masks.foreground(torch.full((3, 7, 7), value), 0.6).all()


def test_foreground_does_not_change_under_a_positive_affine_map() -> None:
    maps = saliency(100).round()
    assert torch.equal(masks.foreground(maps, 0.6), masks.foreground(4 * maps + 64, 0.6))


@pytest.mark.parametrize("role", ["query", "hard_negative"])
@pytest.mark.parametrize("name", ["hp", "mean"])
def test_counts_for_every_foreground_size(role: masks.Role, name: str) -> None:
    recipe = RECIPES[name]
    front = torch.arange(CELLS + 1).repeat(200)
    ratio = torch.rand(len(front), dtype=torch.float64, generator=generator())
    found = masks.counts(ratio, front, CELLS, role, recipe.foreground_cap)
    expected = [
        expected_counts(r, f, role, recipe)
        for r, f in zip(ratio.tolist(), front.tolist(), strict=True)
    ]
    assert found.tolist() == [list(pair) for pair in expected]


def test_pick_takes_as_many_as_asked_and_only_of_the_group() -> None:
    group = torch.rand(2000, CELLS, generator=generator()) < 0.4
    count = torch.randint(0, 30, (2000, 1), generator=generator(1))
    picked = masks.pick(group, count, generator(2))
    assert not (picked & ~group).any()
    assert torch.equal(picked.sum(1), torch.minimum(count[:, 0], group.sum(1)))


def test_pick_is_uniform() -> None:
    group = torch.zeros(20000, CELLS, dtype=torch.bool)
    group[:, 10:20] = True
    share = masks.pick(group, torch.full((20000, 1), 3), generator()).double().mean(0)[10:20]
    # five standard deviations of a share of 0.3 over 20000 draws
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 20000)


@pytest.mark.parametrize("role", ["query", "hard_negative"])
@pytest.mark.parametrize("name", ["hp", "blur", "mean"])
def test_masked_cells_follow_the_counts(role: masks.Role, name: str) -> None:
    recipe, maps = RECIPES[name], saliency(400, seed=3)
    drawn = masks.draw(maps, recipe, role, generator())
    low, high = recipe.query_ratio if role == "query" else recipe.hard_negative_ratio
    assert low <= drawn.ratio.min() < drawn.ratio.max() <= high
    cells = cells_of(drawn.pixels[~drawn.focal], recipe.cell)
    front = front_of(maps[~drawn.focal])
    for grid, inside, ratio in zip(cells, front, drawn.ratio[~drawn.focal].tolist(), strict=True):
        expected = expected_counts(ratio, int(inside.sum()), role, recipe)
        for channel in grid:
            assert ((channel & inside).sum(), (channel & ~inside).sum()) == expected


def test_the_mixture_of_mask_types_is_that_of_hp() -> None:
    recipe = RECIPES["hp"]
    drawn = masks.draw(saliency(2000), recipe, "query", generator())
    assert abs(drawn.focal.double().mean() - 0.2) < 0.04
    cells = cells_of(drawn.pixels[~drawn.focal], recipe.cell)
    alike = (cells == cells[:, :1]).all(axis=(1, 2, 3))
    assert abs(alike.mean() - 0.3) < 0.05  # two channels hardly ever draw the same cells


def test_blur_and_mean_mask_all_channels_alike_and_draw_no_windows() -> None:
    for name in ("blur", "mean"):
        drawn = masks.draw(saliency(200), RECIPES[name], "query", generator())
        assert not drawn.focal.any()
        assert (drawn.pixels == drawn.pixels[:, :1]).all()


@pytest.mark.parametrize(("crop", "kept", "filled"), [(224, 200, 130), (112, 100, 65), (7, 6, 4)])
def test_focal_windows(crop: int, kept: int, filled: int) -> None:
    recipe = Recipe(crop_size=crop, focal_probability=1.0, high_pass=False)
    keeps = ~masks.draw(saliency(300), recipe, "query", generator()).pixels
    fills = masks.draw(saliency(300), recipe, "hard_negative", generator()).pixels
    for window, side in ((keeps, kept), (fills, filled)):
        rows, columns = window[:, 0].any(2), window[:, 0].any(1)
        assert (rows.sum(1) == side).all()
        assert (columns.sum(1) == side).all()
        # it is a rectangle, the same in all channels
        assert torch.equal(window[:, 0], rows.unsqueeze(2) & columns.unsqueeze(1))
        assert (window == window[:, :1]).all()
        starts = rows.int().argmax(1)
        assert (starts.min(), starts.max()) == (0, crop - side)


def test_a_single_foreground_cell_can_be_masked() -> None:
    maps = torch.full((200, 7, 7), 10.0)
    maps[:, 3, 4] = 250.0  # the others lie 0.14 std below the mean
    recipe = Recipe(foreground_margin=0.0, hard_negative_ratio=(0.6, 0.7), focal_probability=0.0)
    drawn = masks.draw(maps, recipe, "hard_negative", generator())
    cells = cells_of(drawn.pixels, recipe.cell)
    assert cells[:, :, 3, 4].all()
    assert cells.sum() == 200 * 3


def test_unguided_masks_ignore_saliency_and_take_the_ratio_of_all_cells() -> None:
    recipe = Recipe(guided=False, hard_negatives=0, focal_probability=0.0)
    first = masks.draw(saliency(300, seed=1), recipe, "query", generator())
    second = masks.draw(saliency(300, seed=2), recipe, "query", generator())
    assert torch.equal(first.pixels, second.pixels)
    cells = cells_of(first.pixels, recipe.cell)
    expected = [[math.floor(CELLS * ratio)] * 3 for ratio in first.ratio.tolist()]
    assert cells.sum((2, 3)).tolist() == expected
