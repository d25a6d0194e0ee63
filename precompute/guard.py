"""Refuse to write a dataset among its own inputs, also if links or mounts give them other names."""

import os
import posixpath
import re
from collections.abc import Iterable

from fsspec.utils import glob_translate

from precompute.sources.base import is_pattern
from schemas.errors import UserError
from schemas.storage import Store
from schemas.tables import CARD, REJECTS, SAMPLES, SHARD_FOLDER, SHARDS, shard_name

MOUNTS = "/proc/self/mountinfo"
WRITTEN = (
    *(CARD, SAMPLES, SHARDS, REJECTS, "stats.json"),
    *(shard_name(0, suffix) for suffix in ("tar", "idx", "parquet")),
)


def refuse_own_inputs(out: str, root: str) -> None:
    """Refuse an OUT whose files would be inputs when ROOT is listed again. Raises UserError."""
    if is_pattern(root):
        if file := find_match(Store(out), root):
            raise UserError(f"{out}: its {file} would match {root}; choose a folder outside of it")
        return
    if overlap(Store(out), Store(root)):
        raise UserError(f"{out}: lies inside {root}, whose files are the inputs")


def refuse_linked_inputs(out: str, links: Iterable[str]) -> None:
    """Refuse an OUT in a folder that a link below ROOT leads to. Raises UserError."""
    for link in links:
        if overlap(Store(out), Store(link)):
            raise UserError(
                f"{out}: lies inside {os.path.realpath(link)}, whose files are inputs by the link "
                f"{link}"
            )


def overlap(out: Store, inputs: Store) -> bool:
    """Return whether OUT lies inside the inputs' folder, or the inputs inside OUT's shards."""
    if type(out.fs) is not type(inputs.fs):
        return False
    base, out_place, shards_place = (
        resolve_place(store) for store in (inputs, out, Store(get_shards_folder(out)))
    )
    return (
        any(place[: len(base)] == base for place in (out_place, shards_place))
        or base[: len(shards_place)] == shards_place
    )


def get_shards_folder(out: Store) -> str:
    return f"{out.location('').rstrip('/')}/{SHARD_FOLDER}"


def resolve_place(store: Store) -> list[str]:
    """Return the device of a folder and the parts of its path on it, with links resolved.

    A bind mount shows one folder under two paths, which resolving links does not reveal, so a local
    path is given relative to its own file system.
    """
    if not store.is_local:
        return posixpath.normpath(store.root).split("/")
    path = os.path.realpath(store.root)
    device, mount_root, below = "", "/", path
    for mounted, place, folder in list_mounts():
        if f"{path}/".startswith(f"{folder.rstrip('/')}/"):  # the last match is on top
            device, mount_root, below = mounted, place, os.path.relpath(path, folder)
    return [device, *(part for part in f"{mount_root}/{below}".split("/") if part not in ("", "."))]


def list_mounts() -> list[tuple[str, str, str]]:
    """Return device, folder on that device and mount point of every mount; empty without /proc.

    The order is such that a mount comes after those that it covers.
    """
    try:
        with open(MOUNTS, "rb") as file:
            lines = [line.split() for line in file]
    except OSError:
        return []
    mount_points = [
        (unescape(fields[2]), unescape(fields[3]), unescape(fields[4])) for fields in lines
    ]
    return sorted(mount_points, key=lambda mount: len(mount[2].rstrip("/")))


def unescape(field: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field))


def find_match(out: Store, pattern: str) -> str:
    """Return the first file of a dataset at OUT that a glob would match; "" if there is none."""
    inputs = Store(posixpath.dirname(re.split(r"[*?\[]", pattern, maxsplit=1)[0]) or ".")
    place, base = resolve_place(out), resolve_place(inputs)
    if type(out.fs) is not type(inputs.fs) or place[: len(base)] != base:
        return ""
    regex = re.compile(glob_translate(Store(pattern).root))
    return next(
        (
            name
            for name in WRITTEN
            if regex.match(posixpath.join(inputs.root, *place[len(base) :], name))
        ),
        "",
    )
