"""Masks and fills by name; a user's own join them without a change here."""

from collections.abc import Callable
from typing import TypeVar

from schemas import UserError
from schemas.cli import imported, lookup

Function = TypeVar("Function", bound=Callable)


def register(kind: str, name: str, registry: dict) -> Callable[[Function], Function]:
    """A decorator that puts a function under `name`. Raises UserError where the name is taken."""

    def add(function: Function) -> Function:
        if name in registry or ":" in name or name == "none":
            raise UserError(f"{kind} {name!r}: the name is taken, or holds a colon")
        registry[name] = function
        return function

    return add


def find(kind: str, name: str, registry: dict[str, Function]) -> Function:
    """The function of that name; `FILE.py:function` and `module:function` are
    imported.

    Raises:
        UserError: no such name (with the nearest one), module or function.
    """
    return imported(kind, name) if ":" in name else lookup(kind, name, registry)
