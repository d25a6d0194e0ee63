"""Weights in a file from anywhere: its state_dict, and the prefix of a network's names in it.

MoCo keeps `module.encoder_q.conv1.weight`, solo-learn `backbone.conv1.weight` below `state_dict`,
DINO a dict for `student` and one for `teacher`, lightly a `Sequential` whose parts have numbers for
names. None of that is asked of the user: the prefix is found by comparing names and shapes.

This file knows no torch: whoever has it hands in how a file is read.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import UserError

Tensors = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Stub = tuple[type, str]

DEPTH = 6
"""Levels of mappings that are looked through (VISSL's has five)."""
PREFERRED = ("teacher",)
"""Of several copies of a network the one that its authors evaluate; else the first in the file."""
SHOWN = 3
UNKNOWN_CLASS = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
MOST_CLASSES = 200


class Items(OrderedDict):
    """Stands for an object of a class that is not loaded (options, a logger): a plain mapping."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return OrderedDict()  # whose items and attributes the reader of pickles may fill


class Elements(list):
    """Likewise for a sequence, a plain list."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return []


class Opaque:
    """Likewise for a number or a type of numpy; it forgets what it is given."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def stubs_of(name: str) -> list[Stub]:
    """What stands for an unknown class of a pickle, so that no code of it is loaded or run."""
    kind: type = Opaque if name.startswith("numpy.") else Items
    if name.endswith((".deque", ".UserList")):
        kind = Elements
    # the reader names what is built in without its module
    names = [name] if "." in name else [f"builtins.{name}", f"__builtin__.{name}"]
    return [(type(full, (kind,), {}), full) for full in names]


@dataclass(frozen=True)
class Fit:
    """Where a network's weights lie in a file.

    Attributes:
        tensors: the network's own names -> tensors of the file.
        told: one line on what was taken; empty where the names are the network's own.
    """

    tensors: dict[str, Any]
    told: str


def read_weights(
    path: Path,
    load_pickle: Callable[[Path, Sequence[Stub]], Any],
    load_safetensors: Callable[[Path], Any],
) -> Any:
    """Read the content of a file of weights, whatever its suffix.

    Args:
        load_pickle: reads with `weights_only`, taking each (class, "module.name") for safe.
        load_safetensors: reads a safetensors file.

    Raises:
        UserError: no such file, or one that neither can read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    stubs: list[Stub] = []
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # behind the length of its header
            return load_safetensors(path)
        while True:
            try:
                return load_pickle(path, stubs)
            except Exception as error:
                unknown = UNKNOWN_CLASS.search(str(error))
                added = stubs_of(unknown[1]) if unknown else []
                known = {name for _, name in stubs}
                if not added or added[0][1] in known or len(stubs) > MOST_CLASSES:
                    raise
                stubs += added
    except Exception as error:  # of the readers: there is no list of what they raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable state_dict ({reason[:200]})") from error


def fit_weights(
    content: Any, wanted: Shapes, where: str, network: str, children: Sequence[str] = ()
) -> Fit:
    """Find a network's weights in the content of a file.

    All wanted names must be there in their shapes, under one prefix; further layers of the
    network's own parts are another network. What else there is (a head, a queue) is left out.

    Args:
        content: of `read_weights`.
        wanted: the network's names -> shapes, without batch counters.
        where: the file, for messages.
        network: what it is called in messages.
        children: names of the network's parts in order, to know them again in a Sequential.

    Raises:
        UserError: nothing fits; with the first names of both, and what is wrong with the nearest.
    """
    found = list(state_dicts(content))
    if not found:
        raise UserError(f"{where}: not a state_dict: it must map names to tensors")
    nearest: tuple[int, str] = (-1, "")
    fits: list[tuple[bool, str, dict[str, Any]]] = []
    for path, tensors in found:
        for names in namings(wanted, children):
            for prefix in prefixes(tensors, names):
                problem, right = misfit(tensors, prefix, names, wanted)
                if not problem:
                    place = ".".join([*path, prefix.removesuffix(".")]).strip(".")
                    taken = {name: tensors[prefix + own] for name, own in names.items()}
                    fits.append((not any(p in place for p in PREFERRED), place, taken))
                elif right > nearest[0]:
                    nearest = right, problem
    if not fits:
        first = ", ".join(list(found[0][1])[:SHOWN])
        raise UserError(
            f"{where}: not weights of {network}: it {nearest[1] or 'has other names'}. It has "
            f"{first} ..., the network {', '.join(list(wanted)[:SHOWN])} ..."
        )
    _, place, taken = min(fits, key=lambda fit: fit[0])
    others = [other for _, other, _ in fits if other != place]
    total = sum(len(tensors) for _, tensors in found)
    told = ""
    if place or others:
        told = f"{where}: {network} is {place or 'at its top'}, {len(taken)} of {total} tensors"
        told += f"; it is in {', '.join(others)} too" if others else ""
    return Fit(taken, told)


def state_dicts(
    content: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """All mappings of names to tensors in nested ones, each with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and is_tensor(v)}
    if tensors:
        yield path, tensors
    if len(path) < DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from state_dicts(value, (*path, str(key)))


def is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "is_floating_point")


def namings(wanted: Shapes, children: Sequence[str]) -> Iterator[dict[str, str]]:
    """The network's names -> how a file may call them: so, or with numbers for its parts."""
    yield {name: name for name in wanted}
    if children:
        number = {child: str(place) for place, child in enumerate(children)}
        parts = {name: name.partition(".") for name in wanted}
        if all(part in number for part, _, _ in parts.values()):
            yield {n: f"{number[part]}.{rest}" for n, (part, _, rest) in parts.items()}


def prefixes(tensors: Tensors, names: Mapping[str, str]) -> list[str]:
    """What stands before one of the names in any of the tensors' names, in the file's order."""
    own = set(names.values())
    found: dict[str, None] = {}
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                found[".".join([*parts[:start], ""]) if start else ""] = None
    return list(found)


def misfit(
    tensors: Tensors, prefix: str, names: Mapping[str, str], wanted: Shapes
) -> tuple[str, int]:
    """What is wrong with the tensors under a prefix, empty if nothing; and how many names fit."""
    under = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    own = set(names.values())
    parts = {name.partition(".")[0] for name in own}
    missing = [name for name, other in names.items() if other not in under]
    misshapen = [
        f"{name} {tuple(under[other].shape)}, not {tuple(wanted[name])}"
        for name, other in names.items()
        if other in under and tuple(under[other].shape) != tuple(wanted[name])
    ]
    unknown = [
        name
        for name in under
        if name not in own
        and name.partition(".")[0] in parts
        and not name.endswith("num_batches_tracked")
    ]
    right = len(names) - len(missing) - len(misshapen)
    for problem, keys in (("lacks", missing), ("misshapes", misshapen), ("has unknown", unknown)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            at = f" under {prefix.removesuffix('.')}" if prefix else ""
            return f"{problem} {', '.join(keys[:SHOWN])}{more}{at}", right
    return "", right


def shapes_of(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """A state_dict's names and shapes without its batch counters, which many files lack."""
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
