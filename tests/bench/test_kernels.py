"""Check the goal of issue "the pixel chain": under 80 kernels and 8 GB per batch of 256 at 224 px.

`bench.kernels` says what is counted: operators by fake tensors, and the kernels that Inductor
generates for an H100, with the bytes that its scheduler reports for each.
"""

import pytest

from bench import kernels
from pipeline import RECIPES
from schemas import UserError

pytest.importorskip("triton")


@pytest.mark.slow
def test_hp_takes_few_kernels_and_few_bytes() -> None:
    cost = kernels.count(RECIPES["hp"], 256)
    assert 10 < cost.kernels < 80
    # The images alone are read once (77 MB) and written once (3 x 154 MB).
    assert 0.5e9 < cost.bytes < 8e9


def test_without_a_compiler_it_takes_no_more_than_before() -> None:
    cost = kernels.count(RECIPES["hp"], 256, compiled=False)
    assert 500 < cost.kernels < 730
    assert 20e9 < cost.bytes < 34e9


def test_a_recipe_that_cannot_be_counted_is_refused_first() -> None:
    with pytest.raises(UserError, match="--recipes maskco: it draws boxes on a real device"):
        kernels.build_table(kernels.Options(recipes=("hp", "maskco")))
