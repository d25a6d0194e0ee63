"""Look up masks and fills by name; users can register their own."""

from collections.abc import Callable
from typing import TypeVar

from schemas import UserError
from schemas.cli import import_object, lookup

Function = TypeVar("Function", bound=Callable)


def register(kind: str, name: str, registry: dict) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as `name`.

    Raises:
        UserError: the name is taken, is "none" or contains a colon.
    """

    def add(function: Function) -> Function:
        if name in registry or ":" in name or name == "none":
            raise UserError(
                f'{kind} {name!r}: choose a name that is not registered, is not "none" and has no '
                "colon"
            )
        registry[name] = function
        return function

    return add


def find(kind: str, name: str, registry: dict[str, Function]) -> Function:
    """Return the function of this name, or import it from `FILE.py:function` or `module:function`.

    Raises:
        UserError: there is no such name (the message suggests the nearest one), module or function.
    """
    return import_object(kind, name) if ":" in name else lookup(kind, name, registry)
