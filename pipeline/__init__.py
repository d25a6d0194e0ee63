"""Shards -> masked views on the device."""

import saliency_shards  # noqa: F401  under `python -m` it puts the project's own folder first

# isort: split
import pipeline.released  # noqa: F401  adds its masks, fill and recipes to the registries
from pipeline.batch import Batch
from pipeline.cache import Cache
from pipeline.eval_loader import EvalBatch, EvalViews
from pipeline.loader import MaskedViews
from pipeline.recipes import RECIPES, Recipe, get_recipe

__all__ = [
    "RECIPES",
    "Batch",
    "Cache",
    "EvalBatch",
    "EvalViews",
    "MaskedViews",
    "Recipe",
    "get_recipe",
]
