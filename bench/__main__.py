"""Measure this machine.

python -m bench loader --data URL       views/s beside the usual ways, on the same images
python -m bench estimators --data URL   saliency maps/s
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import estimators, loader
from bench.table import machine, measure, show, write
from schemas import UserError
from schemas.cli import parse, run


def main() -> int:
    commands = {"loader": bench_loader, "estimators": bench_estimators}
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip() if __doc__ else "")
        return 0
    if name not in commands:
        raise UserError(f"unknown command {name!r}: there are {', '.join(commands)}")
    commands[name](argv)
    return 0


def bench_loader(argv: Sequence[str]) -> None:
    options = parse(loader.Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(loader.ways(options, Path(folder)), options.repeats)
    print(show("Loader", rows, loader.bases([row.name for row in rows])), end="\n\n")
    finish(options.out, {"Loader": rows}, asdict(options))


def bench_estimators(argv: Sequence[str]) -> None:
    options = parse(estimators.Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(estimators.ways(options, Path(folder)), options.repeats)
    base = {row.name: "scda resnet50" for row in rows}
    print(show("Precompute, one process", rows, base), end="\n\n")
    finish(options.out, {"Precompute, one process": rows}, asdict(options))


def finish(out: Path, tables: dict, settings: dict) -> None:
    write(out, tables, {**settings, "out": str(out)})
    print(f"{machine()['cores']} cores, {machine()['device']}; written to {out}")


if __name__ == "__main__":
    run(main)
