"""Recipes: what they hold, and which values they refuse."""

import dataclasses

import pytest

from pipeline import RECIPES, Recipe, get_recipe
from schemas import UserError


def test_names() -> None:
    assert list(RECIPES) == ["hp", "blur", "mean", "mscn", "maskco", "none"]
    assert get_recipe("hp") == Recipe()


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown recipe 'blurr': did you mean blur"):
        get_recipe("blurr")


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_recipe("hp").crop_size = 7  # type: ignore[misc]


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
    ],
)
def test_a_value_without_sense_is_refused_by_its_name(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"recipe: {next(iter(changes))} is"):
        Recipe(**changes)  # type: ignore[arg-type]
