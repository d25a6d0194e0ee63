"""Entry point of the installed commands: only its name is unique to this project.

A user's folder may hold a `train.py`, a `pipeline/` or a `schemas/`. It comes first on `sys.path`
under `python -m`, and with `PYTHONPATH=.` under the installed commands too. So a command puts the
project's folder first before it imports anything of the project; under `python -m PACKAGE` that
happens when this module is imported by the package's `__init__`. A program that merely imports a
package of this project keeps its path.
"""

import importlib
import io
import os
import sys
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)
ROOMS = tuple(
    room
    for room in ("schemas", "precompute", "pipeline", "train", "bench")
    if os.path.isdir(os.path.join(FOLDER, room))
)
"""The packages of this project that exist here: `bench` is in a checkout and is not installed."""


def own_rooms_first() -> None:
    """Put this project's folder first on the path, here and in processes that are started from
    here.

    Prints on stderr which modules of the same names are skipped. Exits with status 2 if one of them
    was imported already.
    """
    for room in ROOMS:
        own = os.path.join(FOLDER, room)
        there = place_of(getattr(sys.modules.get(room), "__spec__", None))
        if room in sys.modules and there != own:
            print(
                f"error: {room} is {there or 'of no file'}, which was imported before this "
                f"command, and not {own}; start it without that on PYTHONPATH",
                file=sys.stderr,
            )
            sys.exit(2)
    others = [path for path in sys.path if os.path.realpath(path) != FOLDER]
    for room in ROOMS:
        foreign = place_of(PathFinder.find_spec(room, others))
        if foreign and foreign != os.path.join(FOLDER, room) and os.environ.get("RANK", "0") == "0":
            print(f"note: {foreign} is passed over: {room} is this project's", file=sys.stderr)
    sys.path[:] = [FOLDER, *others]
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    # Ray passes the current folder to its workers, multiprocessing passes the path.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([FOLDER, *inherited]))
    importlib.invalidate_caches()


def own_rooms_first_under_m() -> None:
    """Call `own_rooms_first` if `python -m PACKAGE` is being started; otherwise do nothing."""
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]
    if module and module[0].split(".")[0] in ROOMS:
        own_rooms_first()


def place_of(spec: object) -> str | None:
    """Return a package's folder or a module's file, with links resolved; None if it has neither."""
    folders = list(getattr(spec, "submodule_search_locations", None) or [])
    file = getattr(spec, "origin", None)
    place = folders[0] if folders else file
    return os.path.realpath(place) if place else None


def start(module: str) -> None:
    """Run a command; answer --version without the seconds that importing torch takes."""
    if "--version" in sys.argv[1:]:
        print(f"saliency-shards {version('saliency-shards')}")
        sys.exit(0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # lines reach a log file as they are printed
    own_rooms_first()
    importlib.import_module(module).start()


def shards() -> None:
    start("schemas.__main__")


def precompute() -> None:
    start("precompute.__main__")


def pipeline() -> None:
    start("pipeline.__main__")


def train() -> None:
    start("train.__main__")


def evaluate() -> None:
    start("train.evaluate.__main__")


def report() -> None:
    start("train.report")


own_rooms_first_under_m()
