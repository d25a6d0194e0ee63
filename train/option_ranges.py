"""The ranges of numeric options, and paths that must be local, checked before anything is built."""

import math
from collections.abc import Mapping
from typing import Any

from schemas import UserError
from schemas.parser import LOCAL_PATH

AT_LEAST_1 = (
    "batch_size", "grad_accum_steps", "epochs", "keep_checkpoints", "log_steps",
    "checkpoint_steps", "rank_timeout", "synthetic", "shuffle_shards", "streams",
    "knn.epochs", "knn.batch_size", "knn.neighbors",
    "method.queue", "method.projection", "method.hidden", "method.head_layers", "method.masks",
    "method.channels", "method.region_size", "method.prediction_depth",
    "rois", "proposals", "short_sides", "test_side",
)  # fmt: skip
ABOVE_0 = (
    "cache_gb", "optim.lr", "optim.base_lr", "optim.clip_gradient", "optim.trust_coefficient",
    "method.temperature", "method.mask_rate",
)  # fmt: skip
AT_LEAST_0 = (
    "workers", "optim.weight_decay", "optim.milestones", "method.rho", "method.sparsity",
    "method.entropy",
)  # fmt: skip
SEEDS = ("seed",)
BELOW_1 = ("optim.momentum",)
UP_TO_1 = ("method.ema_momentum", "method.label_smoothing")
LOCAL = ("out", "cache", "encoder")
"""Paths of which pathlib would make a folder `s3:` in the current one."""

REQUIREMENTS = (
    ("at least 1", lambda value: value >= 1, AT_LEAST_1),
    ("above 0 and finite", lambda value: 0 < value < math.inf, ABOVE_0),
    ("at least 0 and finite", lambda value: 0 <= value < math.inf, AT_LEAST_0),
    ("at least 0 and below 2^64", lambda value: 0 <= value < 2**64, SEEDS),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, BELOW_1),
    ("between 0 and 1", lambda value: 0 <= value <= 1, UP_TO_1),
    (LOCAL_PATH, lambda value: "://" not in value, LOCAL),
)


def check_ranges(options: Mapping[str, Any]) -> None:
    """Check the options of a run or an evaluation that have a range or are local paths.

    None is always valid.

    Args:
        options: flat options, dotted name -> value, as from `schemas.settings.flatten`.

    Raises:
        UserError: a number is outside its range or is not a number, or a path is a URL; the message
            names its flag.
    """
    for requirement, is_valid, names in REQUIREMENTS:
        for name in names:
            value = options.get(name)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not is_valid(number):
                    raise UserError(f"{format_flag(name)} {number}: must be {requirement}")


def format_flag(name: str) -> str:
    """Return the flag of an option; those of the method and the optimizer have no prefix."""
    flag = name.removeprefix("method.").removeprefix("optim.").replace("_", "-")
    return f"--{flag}"
