"""Foreground, counts, positions and mixtures of masks against the oracle, on 2,500 views each.

Counts are compared exactly. A correct build violates the bounds on distributions in less than one
of a million runs, and the random numbers are seeded.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from pipeline import RECIPES, Recipe
from pipeline.masks import Masks, Role, draw_masks, find_foreground
from tests.pipeline import oracle
from tests.pipeline.conftest import rng_of

CELLS = 49
VIEWS = 2500
MASKED = ["hp", "blur", "mean", "mscn"]
SIGMAS = 5.5
"""Allowed standard deviations of a frequency: two-sided, 4 in 100 million."""


def maps(size: int = VIEWS, seed: int = 0) -> torch.Tensor:
    """Return saliency maps: noise, blobs, constants, and two levels (1, 2, 3 or 48 high cells)."""
    random = np.random.default_rng(seed)
    saliency = random.random((size, 7, 7)) * 255
    rows, columns = np.mgrid[:7, :7]
    for index in range(0, size, 3):
        y, x, width = *random.uniform(0, 7, 2), random.uniform(0.5, 4)
        saliency[index] = 255 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width**2)
    cells = random.permuted(np.tile(np.arange(CELLS), (size, 1)), axis=1)
    for index in range(0, size, 10):
        flat = saliency[index].reshape(-1)
        kind = index // 10 % 5
        if kind == 0:
            flat[:] = 77.0  # all 49 are foreground
        else:
            high = {1: 1, 2: 2, 3: 48, 4: 3}[kind]
            flat[:] = 0
            flat[cells[index, :high]] = 255
    return torch.from_numpy(saliency.astype(np.float32))


def cells_of(masks: Masks, side: int) -> np.ndarray:
    """Return the cells, (N, C, 7, 7), after checking that all pixels of a cell are equal."""
    pixels = masks.to_pixels(side).numpy()
    assert set(np.unique(pixels)) <= {0.0, 1.0}
    size, channels = pixels.shape[:2]
    blocks = pixels.reshape(size, channels, 7, side // 7, 7, side // 7)
    assert (blocks.min((3, 5)) == blocks.max((3, 5))).all(), "a cell is masked in part"
    return blocks.max((3, 5)).astype(bool)


def test_foreground_is_the_oracles() -> None:
    saliency = maps()
    actual = find_foreground(saliency, 0.6).numpy()
    expected = np.stack([oracle.foreground(one) for one in saliency.numpy()])
    assert np.array_equal(actual, expected)
    sizes = set(expected.sum((1, 2)).tolist())
    assert {48, 49} <= sizes
    # Cantelli: at most 1 / (1 + 0.6^2) of all values are below mean - 0.6 std, so 13 never are
    assert min(sizes) >= 13
    doubled = find_foreground(saliency.round() * 4 + 64, 0.6)
    assert torch.equal(doubled, find_foreground(saliency.round(), 0.6))


@pytest.mark.parametrize("role", ["query", "hard_negative"])
@pytest.mark.parametrize("name", MASKED)
def test_counts_follow_the_formula(name: str, role: Role) -> None:
    recipe = dataclasses.replace(RECIPES[name], crop_size=21)
    saliency = maps()
    drawn = draw_masks(saliency, recipe, role, rng_of(VIEWS))
    low, high = recipe.query_ratio if role == "query" else recipe.hard_negative_ratio
    assert low <= drawn.ratio.min() < low + 0.01 < high - 0.01 < drawn.ratio.max() <= high
    # the ratio is uniform: Kolmogorov-Smirnov distance, exceeded in less than one of a million runs
    ordered = np.sort((drawn.ratio.numpy() - low) / (high - low))
    steps = np.arange(1, VIEWS + 1) / VIEWS
    assert max(abs(steps - ordered).max(), abs(steps - 1 / VIEWS - ordered).max()) < 2.7 / 50

    cells = cells_of(dataclasses.replace(drawn, windows=None), recipe.crop_size)
    blind = name == "mscn" and role == "query"
    for view, ratio, grid in zip(saliency.numpy(), drawn.ratio.tolist(), cells, strict=True):
        front = oracle.foreground(view)
        hard, cap = role == "hard_negative", recipe.foreground_cap is not None
        expected = oracle.counts(ratio, int(front.sum()), CELLS, hard, cap)
        for channel in grid:
            if blind:
                assert channel.sum() == math.floor(CELLS * ratio)
            else:
                assert ((channel & front).sum(), (channel & ~front).sum()) == expected


def test_counts_at_every_size_of_foreground_and_the_cap() -> None:
    # D12 and D13: another margin gives the sizes that the recipe's margin cannot
    steps = torch.arange(CELLS, dtype=torch.float32).view(1, 7, 7)
    for number, ratio, cap in itertools.product(
        (0, 1, 2, 10, 47, 48, 49), (0.05, 0.24, 0.7), (False, True)
    ):
        recipe = dataclasses.replace(
            RECIPES["hp" if cap else "mean"], crop_size=21, focal_probability=0.0,
            query_ratio=(ratio, ratio), hard_negative_ratio=(ratio, ratio),
            # move the threshold to just below the last foreground cell
            foreground_margin=float((24 - (CELLS - number) + 0.5) / math.sqrt((CELLS**2 - 1) / 12)),
        )  # fmt: skip
        saliency = steps.repeat(20, 1, 1)
        front = (steps[0] >= CELLS - number).numpy()
        for role, hard in (("query", False), ("hard_negative", True)):
            cells = cells_of(draw_masks(saliency, recipe, role, rng_of(20, number)), 21)  # type: ignore[arg-type]
            in_front, in_back = oracle.counts(ratio, number, CELLS, hard, cap)
            # with the cap, the formula may ask for more background cells than there are
            expected = in_front, min(in_back, CELLS - number)
            for channel in cells.reshape(-1, 7, 7):
                assert ((channel & front).sum(), (channel & ~front).sum()) == expected


def assert_uniform(seen: np.ndarray, probability: float, trials: int) -> None:
    """Check counts of events that have this probability in each of the trials."""
    bound = SIGMAS * math.sqrt(probability * (1 - probability) * trials)
    assert np.abs(seen - probability * trials).max() < bound


@pytest.mark.slow
def test_cells_are_drawn_uniformly_and_independently() -> None:
    trials = 40000
    saliency = torch.zeros(trials, 7, 7)
    saliency[:, 2:6, 1:6] = 255  # 20 are foreground
    recipe = dataclasses.replace(RECIPES["mean"], crop_size=21, query_ratio=(0.25, 0.25))
    cells = cells_of(draw_masks(saliency, recipe, "query", rng_of(len(saliency))), 21)[
        :, 0
    ].reshape(trials, -1)
    front = saliency[0].flatten().numpy() > 0
    for group, count in ((front, 5), (~front, 7)):
        inside, size = cells[:, group], int(group.sum())
        assert (inside.sum(1) == count).all()
        seen = inside.sum(0)
        assert_uniform(seen, count / size, trials)
        # chi-square of the cells: mean size - 1 (less for draws without replacement)
        expected = trials * count / size
        chi = ((seen - expected) ** 2 / expected).sum() / (1 - count / size)
        assert chi < size + 8 * math.sqrt(2 * size)
        together = (inside.T.astype(np.int64) @ inside)[~np.eye(size, dtype=bool)]
        assert_uniform(together, count * (count - 1) / (size * (size - 1)), trials)


@pytest.mark.slow
def test_the_mixture_of_mask_types() -> None:
    trials = 20000
    recipe = dataclasses.replace(RECIPES["hp"], crop_size=21, query_ratio=(0.2, 0.2))
    drawn = draw_masks(torch.rand(trials, 7, 7), recipe, "query", rng_of(trials))
    assert_uniform(np.array([int(drawn.focal.sum())]), 0.2, trials)
    cells = drawn.cells[~drawn.focal]
    alike = (cells == cells[:, :1]).flatten(1).all(1)
    # two of three channels with 9 cells each are hardly ever equal
    assert_uniform(np.array([int(alike.sum())]), 0.3, len(cells))
    for name in ("blur", "mean"):
        still = draw_masks(torch.rand(100, 7, 7), RECIPES[name], "query", rng_of(100))
        assert not still.focal.any()
        assert still.cells.shape[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("crop", "kept", "filled"), [(224, 200, 130), (112, 100, 65), (7, 6, 4)])
def test_focal_windows(crop: int, kept: int, filled: int) -> None:
    recipe = Recipe(
        crop_size=crop, focal_probability=1.0, high_pass=False, soft_blur_probability=0.0
    )
    trials = 600
    sides: tuple[tuple[Role, int], ...] = (("query", kept), ("hard_negative", filled))
    for role, side in sides:
        drawn = draw_masks(torch.rand(trials, 7, 7), recipe, role, rng_of(trials))
        masked = drawn.to_pixels(crop).bool()
        assert (masked == masked[:, :1]).all()
        window = masked[:, 0] if role == "hard_negative" else ~masked[:, 0]
        rows, columns = window.any(2), window.any(1)
        assert (rows.sum(1) == side).all()
        assert (columns.sum(1) == side).all()
        assert torch.equal(window, rows.unsqueeze(2) & columns.unsqueeze(1))
        places = crop - side + 1
        for starts in (rows.int().argmax(1), columns.int().argmax(1)):
            assert (starts.min(), starts.max()) == (0, crop - side)
            spread = math.sqrt((places**2 - 1) / 12 / trials)
            assert abs(starts.double().mean() - (crop - side) / 2) < SIGMAS * spread


def test_query_and_hard_negative_are_independent_draws() -> None:
    recipe = dataclasses.replace(RECIPES["mean"], crop_size=7)
    saliency = torch.rand(4000, 7, 7)
    roles: tuple[Role, ...] = ("query", "hard_negative")
    query, hard = (
        draw_masks(saliency, recipe, role, rng_of(4000, purpose=role)).ratio for role in roles
    )
    assert abs(torch.corrcoef(torch.stack([query, hard]))[0, 1]) < SIGMAS / math.sqrt(4000)


def test_masks_for_other_experiments() -> None:
    saliency = maps(600)
    fronts = np.stack([oracle.foreground(one) for one in saliency.numpy()])
    for name in ("foreground", "background", "random", "block"):
        recipe = dataclasses.replace(
            RECIPES["mean"], crop_size=112, query_mask=name, query_ratio=(0.1, 0.6)
        )
        drawn = draw_masks(saliency, recipe, "query", rng_of(len(saliency)))
        ratios = drawn.ratio.tolist()
        if name == "block":
            aspects = []
            for pixels, ratio in zip(drawn.to_pixels(112)[:, 0], ratios, strict=True):
                rows, columns = pixels.any(1), pixels.any(0)
                assert torch.equal(pixels.bool(), rows.unsqueeze(1) & columns)
                # of the drawn size unless that is longer than the view
                fits = max(int(rows.sum()), int(columns.sum())) < 112
                assert not fits or abs(float(pixels.mean()) - ratio) < 0.02
                aspects.append(float(rows.sum() / columns.sum()))
            # as often high as wide (the logarithm is uniform), up to 3.3 times
            assert_uniform(
                np.array([sum(a > 1 for a in aspects if a != 1)]), 0.5, sum(a != 1 for a in aspects)
            )
            assert 0.28 < min(aspects) < 0.35
            assert 3.0 < max(aspects) < 3.5
            continue
        for cells, front, ratio in zip(cells_of(drawn, 112)[:, 0], fronts, ratios, strict=True):
            of_front, of_back = int(front.sum()), int((~front).sum())
            seen = ((cells & front).sum(), (cells & ~front).sum())
            if name == "random":
                assert cells.sum() == math.floor(ratio * CELLS)
            elif name == "foreground":
                assert seen == (round(ratio * (of_front / CELLS) * CELLS), 0)
            else:
                assert seen == (0, round(ratio * of_back))
