"""The study's arms differ in nothing but what they are for; what is missing is told at once."""

import dataclasses
from pathlib import Path

import pytest

from bench import study
from schemas import UserError
from train.config import TrainConfig


def options(folder: Path, **changes) -> study.Options:
    return dataclasses.replace(
        study.Options(shards=folder / "shards", out=folder / "out"), **changes
    )


def test_arms_differ_in_method_and_recipe_alone(tmp_path: Path) -> None:
    given = options(tmp_path)
    names = study.arms(given)
    assert {"none", "hp", "hp-no-hard", "hp-key", "hp-both", "mscn", "adios", "maskco"} <= set(
        names
    )
    assert {f"simclr-{n}" for n in ("none", "mscn", "adios", "hp", "blur", "mean")} <= set(names)
    first: TrainConfig | None = None
    for name in names:
        config = study.config_of(given, name, 1)
        own = dataclasses.replace(
            config, out="", method=study.arms(given)["none"].method, recipe=given_recipe(given)
        )
        first = first or own
        assert own == first, name


def given_recipe(given: study.Options):
    return study.arms(given)["none"].recipe


def test_what_is_missing_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown arm 'hpp'"):
        study.run(options(tmp_path, arms=("hpp",)))
    with pytest.raises(UserError, match="no dataset here"):
        study.run(options(tmp_path, arms=("hp",)))
    (tmp_path / "shards" / "x-train").mkdir(parents=True)
    with pytest.raises(UserError, match="x-test: no such dataset"):
        study.run(options(tmp_path, arms=("hp",)))
