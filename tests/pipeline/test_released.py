"""The released recipes equal loops that follow the released code (D1, D9, D12 and D13)."""

import itertools
import math

import numpy as np
import pytest
import torch

from pipeline import RECIPES
from pipeline.fills import FILLS
from pipeline.masks import MASKS, Role, draw_masks
from pipeline.released import find_released_foreground
from tests.pipeline.conftest import rng_of

CELLS = 49
NAMES = ["hp-released", "blur-released", "mean-released"]


def localize(saliency: np.ndarray) -> list[int]:
    """Find the foreground as localize.py does: sort rows (D1), then apply the relaxed rule."""
    rows = [sorted(row) for row in saliency.astype(np.float64).tolist()]
    values = [value for row in rows for value in row]
    mean = sum(values) / CELLS
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / CELLS)
    return [n for n, value in enumerate(values) if value >= mean or mean - value <= 0.6 * std]


def released_counts(front: int, ratio: float, hard: bool, cap: bool) -> tuple[int, int]:
    """Return the numbers of foreground and background cells that random_mask_*.py masks."""
    share = ratio * (front / CELLS)
    if cap and share >= 0.56:
        share = 0.55
    of_front = round(share * CELLS)
    of_back = int(CELLS * ratio) - of_front
    shuffled_front, shuffled_back = list(range(front)), list(range(CELLS - front))
    # a list of one index is squeezed to a scalar, which counts as none (D13)
    masked_front = [] if front == 1 else shuffled_front[:of_front]
    # of_back may be -1: the slice omits the last index (D12)
    masked_back = [] if hard or len(shuffled_back) == 1 else shuffled_back[:of_back]
    return len(masked_front), len(masked_back)


def maps() -> torch.Tensor:
    """Return maps with each background size from 0 to 12, and random maps."""
    random = np.random.default_rng(0)
    saliency = []
    for low, _ in itertools.product(range(13), range(60)):
        flat = random.uniform(200, 255, CELLS)
        flat[random.permutation(CELLS)[:low]] = random.uniform(0, 10, low)
        saliency.append(flat.reshape(7, 7))
    saliency += list(random.uniform(0, 255, (400, 7, 7)))
    return torch.from_numpy(np.stack(saliency).astype(np.float32))


def test_foreground_is_that_of_sorted_rows() -> None:
    saliency = maps()
    actual = find_released_foreground(saliency, 0.6).numpy()
    for view, cells in zip(saliency.numpy(), actual, strict=True):
        assert np.flatnonzero(cells).tolist() == localize(view)
        by_row = cells.reshape(7, 7)
        assert (by_row == np.sort(by_row, axis=1)).all()  # D1: right-most in each row


@pytest.mark.parametrize("role", ["query", "hard_negative"])
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_released_codes(name: str, role: Role) -> None:
    recipe, saliency, hard = RECIPES[name], maps(), role == "hard_negative"
    drawn = draw_masks(saliency, recipe, role, rng_of(len(saliency)))
    seen = set()
    for view, ratio, channels in zip(
        saliency.numpy(), drawn.ratio.tolist(), drawn.cells.numpy(), strict=True
    ):
        front = np.zeros(CELLS, bool)
        front[localize(view)] = True
        size = int(front.sum())
        expected = released_counts(size, ratio, hard, cap=name == "hp-released")
        for cells in channels.reshape(-1, CELLS):
            assert ((cells & front).sum(), (cells & ~front).sum()) == expected, (size, ratio)
        clamped = round(ratio * size / CELLS * CELLS), int(CELLS * ratio)
        if size == CELLS - 1:
            seen.add("D13")
        if clamped[0] > clamped[1] and size < CELLS - 1:
            seen.add("D12")
    assert hard or seen == {"D12", "D13"}


def test_which_cells_are_left_out_is_uniform() -> None:
    """D12 leaves one background cell unmasked, all of them with equal probability."""
    saliency = torch.full((4000, 7, 7), 255.0)
    saliency[:, 0, :4] = 0  # four background cells, which sorting keeps there
    recipe = RECIPES["mean-released"]
    ratio = torch.full((4000,), 0.081, dtype=torch.float64)  # 45 * ratio is 3.6, 49 * ratio 3.97
    masked = MASKS[recipe.query_mask](saliency, ratio, recipe, rng_of(4000))
    back = masked[:, 0, :4]
    assert (back.sum(1) == 3).all()
    assert (back.logical_not().sum(0) > 850).all()  # 1000 expected, deviation 27


def test_noise_is_one_tile_for_all_views() -> None:
    """D9: views share a tile, but query and hard negative have different ones."""
    recipe = RECIPES["hp-released"]
    own = rng_of(5)
    first, second = (
        FILLS[recipe.fill](torch.zeros(5, 3, 224, 224), recipe, std, own).expand(5, -1, -1, -1)
        for std in (0.18, 0.14)
    )
    for noise, std in ((first, 0.18), (second, 0.14)):
        tile = noise[0, :, :32, :32]
        assert abs(tile.std().item() - std) < 5 * std / math.sqrt(2 * tile.numel())
        for view, row, column in itertools.product(range(5), range(7), range(7)):
            at = noise[view, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            assert torch.equal(at, tile)
    assert not torch.equal(first[0] / 0.18, second[0] / 0.14)


def test_all_else_is_the_recipe_of_the_poster() -> None:
    for name in NAMES:
        released, own = vars(RECIPES[name]), vars(RECIPES[name.removesuffix("-released")])
        differing = {field for field in own if released[field] != own[field]}
        assert differing - {"fill"} == {"query_mask", "hard_negative_mask"}
