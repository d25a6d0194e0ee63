"""Test the comparison of settings: an option that an older file lacks has its default."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from schemas.settings import (
    NOT_SET,
    Difference,
    defaults_of,
    fill_defaults,
    find_differences,
    flatten,
    format_differences,
    to_plain,
)


@dataclass(frozen=True)
class Recipe:
    areas: tuple[float, ...] = (0.2, 1.0)
    cap: tuple[float, float] | None = (0.56, 0.55)
    choice: str = "random"


@dataclass(frozen=True)
class Options:
    data: str
    recipe: Recipe = field(default_factory=Recipe)
    rate: float = 0.03
    folder: Path | None = None


@pytest.mark.parametrize(
    ("store", "read"),
    [(json.dumps, json.loads), (yaml.safe_dump, yaml.safe_load)],
    ids=["json", "yaml"],
)
def test_values_compare_as_they_were_before_they_were_stored(store, read):
    now = flatten(Options("x", Recipe(areas=(1 / 3, 1.0)), 1e-7, Path("a/b"))) | {
        "count": np.int64(3), "share": np.float64(0.1), "none": None, "nan": float("nan"),
        "pairs": ((1, 2), (3, 4)), "by_name": {"a": (1,)},
    }  # fmt: skip
    then = read(store(to_plain(now)))
    assert find_differences(then, now, {}) == []
    assert find_differences(now, then, {}) == []


def test_nested_and_flat_settings_are_the_same():
    nested = {"recipe": {"choice": "random", "areas": [0.2, 1.0]}, "seed": 0}
    flat = {"recipe.choice": "random", "recipe.areas": (0.2, 1), "seed": 0}
    assert find_differences(nested, flat, {}) == []
    assert flatten(Options("x"))["recipe.areas"] == [0.2, 1.0]


def test_an_option_that_an_older_version_did_not_know_counts_as_its_default():
    now = flatten(Options("x"))
    then = {name: value for name, value in now.items() if name != "recipe.choice"}
    assert find_differences(then, now, defaults_of(Options)) == []
    changed = now | {"recipe.choice": "salient"}
    assert find_differences(then, changed, defaults_of(Options)) == [
        Difference("recipe.choice", "random", "salient")
    ]
    # A version without that option reads the newer file too, as long as nobody set it.
    assert find_differences(now, then, defaults_of(Options)) == []


def test_what_has_no_default_and_is_absent_differs():
    assert "data" not in defaults_of(Options)
    assert find_differences({}, {"data": "x"}, defaults_of(Options)) == [
        Difference("data", NOT_SET, "x")
    ]
    assert format_differences(find_differences({}, {"data": "x"}, {})) == "data was not set, is x"
    assert find_differences({}, {"cap": None}, {}) == [Difference("cap", NOT_SET, None)]


def test_a_removed_option_differs_unless_it_had_its_former_default():
    then = {"seed": 0, "sharpen": True}
    assert (
        format_differences(find_differences(then, {"seed": 0}, {}))
        == "sharpen was True, is not set"
    )
    assert find_differences(then, {"seed": 0}, {"sharpen": True}) == []
    assert format_differences(find_differences(then, {"seed": 0}, {"sharpen": False})) == (
        "sharpen was True, is False"
    )


def test_every_difference_is_named_with_both_values():
    then = flatten(Options("x"))
    now = flatten(Options("x", Recipe(areas=(0.1, 1.0), cap=None), rate=0.1))
    assert format_differences(find_differences(then, now, {})) == (
        "rate was 0.03, is 0.1; recipe.areas was [0.2, 1.0], is [0.1, 1.0]; "
        "recipe.cap was [0.56, 0.55], is None"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [(True, 1), (None, 0), (None, "None"), ([1, 2], [1, 2, 3]), ("1", 1), (0.1, 0.2), ([], None)],
)
def test_values_of_other_kinds_differ(one, other):
    assert find_differences({"a": one}, {"a": other}, {}) == [Difference("a", one, other)]


def test_a_nested_option_that_was_none_and_is_now_set_differs():
    set_, unset = {"views": {"a": 1}}, {"views": None}
    assert [d.name for d in find_differences(unset, set_, {"views": None})] == ["views.a"]
    assert [d.name for d in find_differences(set_, unset, {"views": None})] == ["views.a"]


def test_options_of_another_choice_are_not_listed_one_by_one():
    then = {
        "method": "moco",
        "method.queue": 8,
        "estimator": {"name": "scda", "side": 7},
        "name": "a",
    }
    now = {
        "method": "simclr",
        "method.rho": 2,
        "estimator": {"name": "spectral", "size": 1},
        "name": "b",
    }
    assert [d.name for d in find_differences(then, now, {})] == ["estimator.name", "method", "name"]


def test_long_values_are_cut():
    assert len(format_differences(find_differences({"a": "x" * 500}, {"a": "y" * 500}, {}))) < 200


def test_filled_keeps_existing_values():
    assert fill_defaults({"a": None}, {"a": 1, "b": 2}) == {"a": None, "b": 2}
