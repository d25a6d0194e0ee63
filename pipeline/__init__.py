"""Shards -> masked views on the device."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first

# isort: split
from pipeline.batch import Batch
from pipeline.cache import Cache
from pipeline.loader import MaskedViews
from pipeline.plain import PlainBatch, PlainViews
from pipeline.recipes import RECIPES, Recipe, get_recipe

__all__ = [
    "RECIPES",
    "Batch",
    "Cache",
    "MaskedViews",
    "PlainBatch",
    "PlainViews",
    "Recipe",
    "get_recipe",
]
