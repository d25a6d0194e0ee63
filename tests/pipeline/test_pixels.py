"""The compiled function equals PyTorch's operators, and views do not depend on their batch."""

import dataclasses
import shutil

import cv2
import numpy as np
import pytest
import torch

from pipeline import RECIPES, Recipe, compiling, fused, masks, photometric, pixels
from pipeline.fills import FILLS
from pipeline.photometric import Photometric
from pipeline.pixels import Masking, make_views
from pipeline.rng import Rng
from tests.pipeline.conftest import rng_of
from tests.pipeline.test_oracle_pixels import views

TOLERANCE = 1.3e-5
"""Tolerance in normalized units, which are 0.22 to 0.23 of the range 0 .. 1: 3e-6 of that range."""


FUSED = [name for name, recipe in RECIPES.items() if recipe.fill in (*fused.FUSED_FILLS, "none")]


def parts(name: str, size: int, crop: int) -> tuple[torch.Tensor, Photometric, list, Recipe]:
    """Return images, photometric parameters, two maskings (the first is None) and the recipe.

    A fill draws on the device of the views that it gets, as in the loader.
    """
    recipe = dataclasses.replace(RECIPES[name], crop_size=crop, query_mask="spread", regions=0)
    rng = rng_of(size, 1)
    image = views(size, recipe)[0].image
    parameters = photometric.draw_photometric(size, recipe, rng)
    maskings: list[Masking | None] = [None]
    if recipe.fill != "none":
        drawn = masks.draw_masks(torch.rand(size, 7, 7), recipe, "query", rng)
        if recipe.fill == "noise":
            tile = torch.randn(size, 3, recipe.cell, recipe.cell)
            maskings.append(Masking(drawn, 0.18, tile, None))
        else:

            def content(view: torch.Tensor) -> torch.Tensor:
                own = Rng(1, 0, np.arange(len(view)), "fill", device=view.device)
                return FILLS[recipe.fill](view, recipe, 0.18, own)

            maskings.append(Masking(drawn, 0.18, None, content))
    return image, parameters, maskings, recipe


def rows_of(masking: Masking | None, rows: slice) -> Masking | None:
    if masking is None:
        return None
    noise = None if masking.noise is None else masking.noise[rows]
    return dataclasses.replace(masking, masks=masking.masks.select(rows), noise=noise)


@pytest.mark.parametrize("name", FUSED)
def test_the_fused_function_equals_the_operators(name: str) -> None:
    image, parameters, maskings, recipe = parts(name, 24, 56)
    expected = make_views(image, parameters, maskings, recipe)
    chain = fused.build_chain(recipe)
    actual = chain(
        image, fused.pack_parameters(parameters, recipe), [pixels.to_fused(one) for one in maskings]
    )
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < TOLERANCE
        assert one.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_compiled_function_equals_the_operators() -> None:
    image, parameters, maskings, recipe = parts("hp", 8, 56)
    expected = make_views(image, parameters, maskings, recipe)
    chain = torch.compile(fused.build_chain(recipe), fullgraph=True, dynamic=False)
    actual = chain(
        image, fused.pack_parameters(parameters, recipe), [pixels.to_fused(one) for one in maskings]
    )
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < TOLERANCE


@pytest.mark.parametrize("crop", [56, 84])  # 84: a view does not fill all vector registers
@pytest.mark.parametrize("name", ["hp", "blur", "mean"])
def test_no_batch_changes_a_view(name: str, crop: int) -> None:
    image, parameters, maskings, recipe = parts(name, 12, crop)
    expected = make_views(image, parameters, maskings, recipe)
    for size in (1, 5):
        for start in range(0, 12, size):
            rows = slice(start, start + size)
            own = [rows_of(one, rows) for one in maskings]
            actual = make_views(image[rows], parameters.select(rows), own, recipe)
            for one, other in zip(actual, expected, strict=True):
                assert torch.equal(one, other[rows]), (size, start)


def test_no_number_of_threads_changes_a_view() -> None:
    """At 336 pixels, OpenCV divides some of its work among its threads."""
    image, parameters, maskings, recipe = parts("hp", 4, 336)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    results = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            cv2.setNumThreads(number)
            results.append(make_views(image, parameters, maskings, recipe))
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["hp", "blur", "mean"])
def test_a_batch_at_once_equals_one_by_one(name: str) -> None:
    """On a GPU without a compiler the operators make all views at once; here they run on a CPU."""
    image, parameters, maskings, recipe = parts(name, 24, 56)
    view = pixels.make_unmasked(image, parameters, recipe)
    at_once = pixels.mask_copies(view, maskings, recipe)
    one_by_one = make_views(image, parameters, maskings, recipe)
    for one, other in zip(at_once, one_by_one, strict=True):
        assert (one - other).abs().max() < TOLERANCE


def test_why_nothing_is_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.delenv("CC", raising=False)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(compiling, "find_spec", lambda _: None)
    assert "triton is missing" in str(compiling.find_compile_obstacle(device))
    monkeypatch.setattr(compiling, "find_spec", lambda _: True)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "no C compiler" in str(compiling.find_compile_obstacle(device))
    monkeypatch.setenv("CC", "cc")
    assert compiling.find_compile_obstacle(device) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "6.1" in str(compiling.find_compile_obstacle(device))


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpu_equals_the_cpu(name: str, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    image, parameters, maskings, recipe = parts(name, 24, 56)
    expected = make_views(image, parameters, maskings, recipe)
    device = torch.device("cuda", torch.cuda.current_device())
    if not compiles:
        monkeypatch.setattr(compiling, "explain_missing_compiler", lambda _: "the test says so")
    moved = []
    for one in maskings:
        if one is None:
            moved.append(None)
            continue
        own = one.masks
        windows = own.windows
        if windows is not None:
            rows, columns = windows.rows.to(device), windows.columns.to(device)
            windows = masks.Windows(rows, columns, windows.is_kept)
        on_gpu = masks.Masks(
            own.cells.to(device), windows, own.ratio.to(device), own.focal.to(device)
        )
        noise = None if one.noise is None else one.noise.to(device)
        moved.append(dataclasses.replace(one, masks=on_gpu, noise=noise))
    actual = make_views(image.to(device), parameters, moved, recipe)
    for one, other in zip(actual, expected, strict=True):
        assert (one.cpu() - other).abs().max() < 2e-5  # sums have another order
    if compiles and compiling.explain_missing_compiler(device) is None:
        assert not pixels.get_compiled_chain(recipe)._failed, "compiling failed: see the log"
