"""Methods refuse unsuitable recipes and setups, and name what to use instead."""

from dataclasses import replace

import pytest

from pipeline.recipes import RECIPES
from schemas import UserError
from train.methods import METHODS, Setup, SupervisedConfig
from train.presets import PRESETS

ALONE = replace(RECIPES["none"], pair=False)
WANTED = {
    "adios": {"none"},
    "maskco": {"maskco"},
    "moco": set(RECIPES),
    "simclr": set(RECIPES),
    "supervised": set(RECIPES),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_method_takes_the_recipes_that_it_can_use(method, recipe):
    config = METHODS[method]()
    if recipe in WANTED[method]:
        config.check(RECIPES[recipe])
        return
    (advised,) = WANTED[method]
    with pytest.raises(UserError, match=rf"^method {method}: .*; take --recipe {advised}$"):
        config.check(RECIPES[recipe])


@pytest.mark.parametrize("method", ["moco", "simclr", "adios", "maskco"])
def test_a_query_alone_is_refused_where_a_key_is_needed(method):
    with pytest.raises(UserError, match=f"method {method}: the recipe makes no keys; take --recip"):
        METHODS[method]().check(ALONE)


def test_supervised_takes_a_query_alone():
    SupervisedConfig().check(ALONE)


@pytest.mark.parametrize("changes", [{"fill": "none"}, {"hard_negatives": 1}])
def test_maskco_refuses_what_it_would_not_use(changes):
    METHODS["maskco"]().check(replace(RECIPES["maskco"], region_choice="salient", fill="noise"))
    with pytest.raises(UserError, match="take --recipe maskco"):
        METHODS["maskco"]().check(replace(RECIPES["maskco"], **changes))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_methods(name):
    preset = PRESETS[name]
    preset.config.method.check(replace(preset.config.recipe, **preset.views))


def test_supervised_refuses_shards_where_some_images_have_no_label():
    setup = Setup(encoder="tiny", batch_size=4, classes=3)
    assert SupervisedConfig().build(setup)
    with pytest.raises(UserError, match="supervised: 7 images of the shards have no label"):
        SupervisedConfig().build(replace(setup, count_unlabeled=lambda: 7))
