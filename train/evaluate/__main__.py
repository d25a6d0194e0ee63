"""Evaluate a trained encoder, or write it for another library.

    python -m train.evaluate knn    --encoder RUN --data URL [--test-data URL] [--baseline]
    python -m train.evaluate linear --encoder RUN --data URL --test-data URL
    python -m train.evaluate detection --encoder RUN --dataset voc | coco --root FOLDER
    python -m train.evaluate export --encoder RUN --format torchvision | safetensors | detectron2
    python -m train.evaluate table  RUN ... [--protocol linear]

`--help` behind each lists its options. Encoders of a high-pass recipe see high-pass images here
too. Each evaluation is a line in RUN/results.jsonl; `table` makes a Markdown table of such lines.
`knn`, `linear` and `detection` run under torchrun as well.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from schemas import UserError
from schemas.cli import lookup, parse, run
from train.distributed import is_main
from train.evaluate import export, linear, neighbours, results, tables
from train.process_group import session


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """A Markdown table of evaluations, and of the masked branch where runs differ in it."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = tyro.MISSING
    """Folders of runs, or folders that hold such."""
    protocol: Literal["knn", "linear", "detection"] = "linear"
    """Which evaluations."""


def evaluated(config: type[Any], evaluate: Callable, sentence: Callable, argv: list[str]) -> None:
    """Read the options, evaluate on every rank, and say on one what came out."""
    options = parse(config, argv)
    with session(device=options.device):
        found = evaluate(options)
        if is_main():
            print(sentence(found))


def knn(argv: list[str]) -> None:
    evaluated(neighbours.KnnOptions, neighbours.evaluate, neighbours.table, argv)


def linear_probe(argv: list[str]) -> None:
    evaluated(linear.LinearOptions, linear.evaluate, linear.sentence, argv)


def detection(argv: list[str]) -> None:
    from train.evaluate.detection import command  # here: pycocotools and torchvision's detectors

    evaluated(command.DetectionOptions, command.evaluate, command.sentence, argv)


def write_export(argv: list[str]) -> None:
    print(export.export(parse(export.ExportOptions, argv)))


def show_table(argv: list[str]) -> None:
    options = parse(TableOptions, argv)
    rows = results.collect(options.runs)
    chosen = [row for row in rows if row["protocol"] == options.protocol]
    if not chosen:
        raise UserError(f"no evaluation by {options.protocol} in {', '.join(options.runs)}")
    if options.protocol == "detection":
        print(tables.detection_table(rows))
        return
    print(tables.table(rows, options.protocol))
    if len({tables.setting(row, "recipe.branch") for row in chosen}) > 1:
        for data in dict.fromkeys(row["data"] for row in chosen):
            print("\n" + tables.branch_table(rows, options.protocol, data))


COMMANDS = {
    "knn": knn,
    "linear": linear_probe,
    "detection": detection,
    "export": write_export,
    "table": show_table,
}


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    lookup("command", name, COMMANDS)(argv)


def start() -> None:
    run(main, outlives_reader=True, decodes=True)


if __name__ == "__main__":
    start()
