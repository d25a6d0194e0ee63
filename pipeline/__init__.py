"""Turn shards into masked views on the device."""

import saliency_shards  # noqa: F401  puts the project's own folder first under `python -m`

# isort: split
import pipeline.released  # noqa: F401  registers the masks, fill and recipes of the released code
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
