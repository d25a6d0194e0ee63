"""The comparison of stored maps with online ones."""

from types import SimpleNamespace

import pytest
import torch

from bench.fidelity import Study
from pipeline.masks import find_foreground
from pipeline.recipes import RECIPES


@pytest.mark.parametrize("side", [7, 14])
def test_online_maps_of_any_stride_are_compared_on_the_grid(side: int) -> None:
    """SqueezeNet has a stride of 16, so its map of a view is not the grid of 7 x 7."""
    recipe = RECIPES["hp"]
    cells = torch.rand(3, 7, 7)
    maps = cells.repeat_interleave(side // 7, 1).repeat_interleave(side // 7, 2)
    expected = find_foreground(cells, recipe.foreground_margin).flatten(1)
    study = SimpleNamespace(recipe=recipe)
    assert torch.equal(Study.find_foreground_cells(study, maps), expected)  # type: ignore[arg-type]
