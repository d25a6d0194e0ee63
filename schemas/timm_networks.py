"""Networks of timm, which are named `timm:NAME`; only rooms that run networks use this file.

timm takes seconds to import and is optional for precompute, so it is imported only when such a name
is given.
"""

import difflib
from types import ModuleType
from typing import Any

from schemas.errors import UserError

PREFIX = "timm:"


def is_timm(name: str) -> bool:
    return name.startswith(PREFIX)


def import_timm(kind: str, name: str) -> ModuleType:
    """Import timm for a network; `kind` and `name` begin the message. Raises UserError."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{kind} {name}: timm is not installed; pip install timm") from error
    return timm


def build_convnet(kind: str, name: str, **options: Any) -> Any:
    """Build a ConvNet of timm with random weights.

    Args:
        kind: use of the network, for messages: `encoder` or `backbone`.
        name: `timm:` and a model name of timm.
        options: further options of `timm.create_model`.

    Raises:
        UserError: timm is not installed or has no such network, or the network is not a ConvNet.
    """
    timm, model_name = import_timm(kind, name), name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=1)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        raise UserError(f"{kind} {name!r}: {hint}timm has no such network")
    model = timm.create_model(model_name, pretrained=False, **options)
    attention = [type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__]
    if attention:
        raise UserError(f"{kind} {name}: has attention layers ({attention[0]}); choose a ConvNet")
    return model
