"""Compare the settings of an earlier run with those of this one: the only place that does so.

Checkpoints, loader states, the markers of precompute and a study store the settings that they were
made with. A version that adds an option must still resume from them, so a name that is absent on
one side counts as its default; every other difference is reported with both values.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

LONGEST = 80
"""Maximum number of characters of a value in a message."""


class NotSet:
    """Marker of a setting that is absent and has no default."""

    def __repr__(self) -> str:
        return "not set"


NOT_SET = NotSet()


class Difference(NamedTuple):
    """One setting that differs: its dotted name, and both values as plain values (or NOT_SET)."""

    name: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.name} was {shorten_value(self.saved)}, is {shorten_value(self.current)}"


def find_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Difference]:
    """Compare the settings of an earlier run with those of this one.

    A name that is missing on one side has its default there: an option that is newer than `saved`
    changes nothing until it is set. An option that the current code no longer has is a difference,
    because its effect is gone, unless `defaults` still lists it and `saved` has that value. A name
    that is missing on one side and has no default is a difference. Tuples equal lists, 1 equals
    1.0, and NaN equals NaN, so that values that went through JSON or YAML compare equal to the
    originals.

    Args:
        saved: name -> value, as an earlier run stored it. Values may be mappings or dataclasses;
            their parts have dotted names (`recipe.region_choice`). Flat settings are accepted too.
        current: the settings of this run, in the same form.
        defaults: the current default of each option that may be absent, nested or flat;
            `defaults_of` builds it from a dataclass.

    Returns:
        The differences, sorted by name. Where a choice differs (`method`, `estimator.name`), the
        options below it (`method.*`, `estimator.*`) belong to different things and are left out.
    """
    old, new = fill_defaults(saved, defaults), fill_defaults(current, defaults)
    changes = [
        Difference(name, old.get(name, NOT_SET), new.get(name, NOT_SET))
        for name in sorted(old.keys() | new.keys())
        if not are_equal(old.get(name, NOT_SET), new.get(name, NOT_SET))
    ]
    choices = {difference.name for difference in changes}
    return [difference for difference in changes if not belongs_to(difference.name, choices)]


def fill_defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the settings and add the default of each name that they lack."""
    flat = flatten(settings)
    return {**flatten(defaults), **flat}


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings and dataclasses to one level of dotted names with plain values."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = fields_of(settings)
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": to_plain(value)}
    return flat


def to_plain(value: Any) -> Any:
    """Return a value as JSON would give it back: tuples are lists, NumPy numbers are Python's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = fields_of(value)
    if isinstance(value, Mapping):
        return {str(name): to_plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, PurePath) else value


def defaults_of(options: type) -> dict[str, Any]:
    """Return the defaults of a dataclass, flat; required fields are absent."""
    defaults = {}
    for field in dataclasses.fields(options):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return flatten(defaults)


def format_differences(changes: Iterable[Difference]) -> str:
    """Return all differences in one line, each with both values."""
    return "; ".join(map(str, changes))


def fields_of(options: Any) -> dict[str, Any]:
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def belongs_to(name: str, choices: set[str]) -> bool:
    """Return whether `name` is an option below a choice that differs, and not the choice itself."""
    parts = name.split(".")
    parents = {".".join(parts[:depth]) for depth in range(1, len(parts))}
    chosen_by_name = {f"{parent}.name" for parent in parents} - {name}
    return not choices.isdisjoint(parents | chosen_by_name)


def are_equal(left: Any, right: Any) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(are_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(are_equal(left[key], right[key]) for key in left)
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    return left == right


def shorten_value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
