"""Recipes: their values, and the values that they refuse."""

import dataclasses
from typing import Any

import pytest

from pipeline import RECIPES, Recipe, get_recipe
from schemas import UserError


def test_names() -> None:
    assert list(RECIPES) == [
        "hp", "blur", "mean", "mscn", "maskco", "none",
        "hp-released", "blur-released", "mean-released",
    ]  # fmt: skip
    assert get_recipe("hp") == Recipe()


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'blurr': did you mean blur"):
        get_recipe("blurr")


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("hp").crop_size = 7  # type: ignore[misc]


@pytest.mark.parametrize("crop_size", [32, 64, 96, 225])
@pytest.mark.parametrize("name", ["none", "maskco"])
def test_a_recipe_that_masks_no_cells_takes_any_crop(name: str, crop_size: int) -> None:
    assert dataclasses.replace(get_recipe(name), crop_size=crop_size).crop_size == crop_size


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("hp", {}),
        ("blur", {}),
        ("mscn", {}),
        ("maskco", {"fill": "noise"}),  # its noise is a tile of one cell
        ("maskco", {"hard_negatives": 1}),
    ],
)
def test_a_crop_that_cells_do_not_divide_is_refused_by_the_grids_option(
    name: str, changes: dict[str, Any]
) -> None:
    message = r"crop_size is 96, .* 7 cells a side \(--recipe\.grid\), say 98"
    with pytest.raises(UserError, match=message):
        dataclasses.replace(get_recipe(name), crop_size=96, **changes)
    assert dataclasses.replace(get_recipe(name), crop_size=96, grid=6, **changes).cell == 16


def test_lists_as_from_a_file_of_settings_are_tuples() -> None:
    recipe = Recipe(crop_area=[0.2, 1.0], foreground_cap=[0.56, 0.55])  # type: ignore[arg-type]
    assert recipe == Recipe()
    assert hash(recipe) == hash(Recipe())


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_size": 225},
        {"crop_size": 0},
        {"crop_size": 14, "fill": "blur"},
        {"crop_area": (0.0, 1.0)},
        {"crop_ratio": (2.0, 1.0)},
        {"flip_probability": 1.5},
        {"hue": 0.6},
        {"brightness": 1.1},
        {"soft_blur_sigma": (0.0, 2.0)},
        {"high_pass_kernel": 10},
        {"high_pass_sigma": 0.0},
        {"noise_query": -0.1},
        {"blur_sigma": -1.0},
        {"grid": 0},
        {"query_ratio": (0.3, 0.1)},
        {"query_ratio": (0.3, 1.1)},
        {"hard_negatives": -1},
        {"hard_negatives": 1, "fill": "none"},
        {"foreground_cap": (0.5, 0.6)},
        {"focal_kept": 225},
        {"branch": "neither"},
        {"interpolation": "nearest"},
        {"region_choice": "salience"},
        {"hard_negative_mask": "regions"},
    ],
)
def test_a_value_without_sense_is_refused_by_its_name(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"recipe: {next(iter(changes))} is"):
        Recipe(**changes)  # type: ignore[arg-type]
