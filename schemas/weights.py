"""Find a network's weights in a file from any project: its state_dict and the prefix of its names.

MoCo stores `module.encoder_q.conv1.weight`, solo-learn `backbone.conv1.weight` below `state_dict`,
DINO one dict for `student` and one for `teacher`, lightly a `Sequential` whose parts have numbers
for names. The user need not specify any of that: the prefix is found by comparing names and shapes.
This module does not import torch: the caller passes the functions that read a file.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.counts import join_first
from schemas.errors import UserError

Tensors = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Stub = tuple[type, str]

DEPTH = 6
"""Number of nested levels of mappings that are searched (VISSL's files have five)."""
PREFERRED = ("teacher",)
"""Names of the copy to take if a file has several copies of a network: the one that its authors
evaluate; otherwise the first in the file.
"""
SHOWN = 3
UNKNOWN_CLASS = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")
MOST_CLASSES = 200


class Items(OrderedDict):
    """Stand-in for an object of a class that is not loaded (options, a logger): a plain mapping."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return OrderedDict()  # the unpickler may set its items and attributes


class Elements(list):
    """Stand-in for a sequence of a class that is not loaded: a plain list."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        return []


class Opaque:
    """Stand-in for a NumPy number or type; it discards its arguments."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def build_stubs(name: str) -> list[Stub]:
    """Return stand-ins for an unknown class of a pickle, so that none of its code is run."""
    kind: type = Opaque if name.startswith("numpy.") else Items
    if name.endswith((".deque", ".UserList")):
        kind = Elements
    # The unpickler names builtins without their module.
    names = [name] if "." in name else [f"builtins.{name}", f"__builtin__.{name}"]
    return [(type(full, (kind,), {}), full) for full in names]


@dataclass(frozen=True)
class Fit:
    """A network's weights as found in a file.

    Attributes:
        tensors: the network's own names -> tensors of the file.
        note: one line that says which tensors were taken; empty where the names are the network's
            own.
    """

    tensors: dict[str, Any]
    note: str


class MisfitError(UserError):
    """The content of a file does not fit a network.

    Attributes:
        fitting: share of the network's tensors that the nearest match in the file has with the same
            names and shapes, 0 to 1.
        problem: what is wrong with the nearest match; empty if there is none.
        names: the first names of tensors in the file; empty if it is not a state_dict.
    """

    def __init__(self, message: str, fitting: float = 0.0, problem: str = "", names: str = ""):
        super().__init__(message)
        self.fitting, self.problem, self.names = fitting, problem, names


def read_weights(
    path: Path,
    load_pickle: Callable[[Path, Sequence[Stub]], Any],
    load_safetensors: Callable[[Path], Any],
) -> Any:
    """Read the content of a file of weights, whatever its suffix.

    Args:
        load_pickle: reads with `weights_only`, treating each (class, "module.name") as safe.
        load_safetensors: reads a safetensors file.

    Raises:
        UserError: there is no such file, or neither function can read it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    stubs: list[Stub] = []
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # follows the 8 bytes with the length of the safetensors header
            return load_safetensors(path)
        while True:
            try:
                return load_pickle(path, stubs)
            except Exception as error:
                unknown = UNKNOWN_CLASS.search(str(error))
                added = build_stubs(unknown[1]) if unknown else []
                stub_names = {name for _, name in stubs}
                if not added or added[0][1] in stub_names or len(stubs) > MOST_CLASSES:
                    raise
                stubs += added
    except Exception as error:  # the readers do not document what they raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable state_dict ({reason[:200]})") from error


def fit_weights(
    content: Any, wanted: Shapes, where: str, network: str, children: Sequence[str] = ()
) -> Fit:
    """Find a network's weights in the content of a file.

    All wanted names must be there with their shapes, under one prefix; additional layers inside the
    network's own parts mean that it is another network. Other content (a head, a queue) is left
    out.

    Args:
        content: result of `read_weights`.
        wanted: the network's names -> shapes, without batch counters.
        where: the file, for messages.
        network: name of the network in messages.
        children: names of the network's parts in order, to recognize them in a Sequential.

    Raises:
        MisfitError: nothing fits; the message has the first names of both, and what is wrong with
            the nearest match.
    """
    candidates = list(find_state_dicts(content))
    if not candidates:
        raise MisfitError(f"{where}: not a state_dict: it must map names to tensors")
    nearest: tuple[int, str] = (-1, "")
    fits: list[tuple[bool, str, dict[str, Any]]] = []
    for path, tensors in candidates:
        for names in list_namings(wanted, children):
            for prefix in list_prefixes(tensors, names):
                problem, right = describe_misfit(tensors, prefix, names, wanted)
                if not problem:
                    place = ".".join([*path, prefix.removesuffix(".")]).strip(".")
                    matching = {name: tensors[prefix + own] for name, own in names.items()}
                    fits.append((not any(p in place for p in PREFERRED), place, matching))
                elif right > nearest[0]:
                    nearest = right, problem
    if not fits:
        right, problem = nearest
        first = ", ".join(list(candidates[0][1])[:SHOWN])
        raise MisfitError(
            f"{where}: not weights of {network}: it {problem or 'has other names'}. It has "
            f"{first} ..., the network {', '.join(list(wanted)[:SHOWN])} ...",
            max(right, 0) / len(wanted),
            problem,
            first,
        )
    _, place, matching = min(fits, key=lambda fit: fit[0])
    other_places = [other_place for _, other_place, _ in fits if other_place != place]
    total = sum(len(tensors) for _, tensors in candidates)
    note = ""
    if place or other_places:
        note = f"{where}: {network} is {place or 'at its top'}, {len(matching)} of {total} tensors"
        note += f"; it is in {', '.join(other_places)} too" if other_places else ""
    return Fit(matching, note)


def find_state_dicts(
    content: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Yield every mapping of names to tensors at any depth, with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and is_tensor(v)}
    if tensors:
        yield path, tensors
    if len(path) < DEPTH:
        for key, value in content.items():
            if isinstance(value, Mapping):
                yield from find_state_dicts(value, (*path, str(key)))


def is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "is_floating_point")


def list_namings(wanted: Shapes, children: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield mappings from the network's names to a file's: the same names, or numbers for parts."""
    yield {name: name for name in wanted}
    if children:
        number = {child: str(place) for place, child in enumerate(children)}
        parts = {name: name.partition(".") for name in wanted}
        if all(part in number for part, _, _ in parts.values()):
            yield {n: f"{number[part]}.{suffix}" for n, (part, _, suffix) in parts.items()}


def list_prefixes(tensors: Tensors, names: Mapping[str, str]) -> list[str]:
    """Return every prefix before one of the names in the tensors' names, in the file's order."""
    own = set(names.values())
    matching: dict[str, None] = {}
    for key in tensors:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in own:
                matching[".".join([*parts[:start], ""]) if start else ""] = None
    return list(matching)


def describe_misfit(
    tensors: Tensors, prefix: str, names: Mapping[str, str], wanted: Shapes
) -> tuple[str, int]:
    """Return what is wrong with the tensors under a prefix ("" if nothing), and how many fit."""
    under = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    own = set(names.values())
    parts = {name.partition(".")[0] for name in own}
    missing = [name for name, stored in names.items() if stored not in under]
    misshapen = [
        f"{name} {tuple(under[stored].shape)}, not {tuple(wanted[name])}"
        for name, stored in names.items()
        if stored in under and tuple(under[stored].shape) != tuple(wanted[name])
    ]
    unknown = [
        name
        for name in under
        if name not in own
        and name.partition(".")[0] in parts
        and not name.endswith("num_batches_tracked")
    ]
    right = len(names) - len(missing) - len(misshapen)
    problems = {"lacks": missing, "has other shapes:": misshapen, "has unknown": unknown}
    for problem, keys in problems.items():
        if keys:
            at = f" under {prefix.removesuffix('.')}" if prefix else ""
            return f"{problem} {join_first(keys, SHOWN)}{at}", right
    return "", right


def get_shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return a state_dict's names and shapes without batch counters, which many files lack."""
    return {k: tuple(v.shape) for k, v in state.items() if not k.endswith("num_batches_tracked")}
