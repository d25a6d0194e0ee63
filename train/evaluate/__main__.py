"""Evaluate a trained encoder, or write it for another library.

    saliency-evaluate knn       --encoder RUN --data URL [--test-data URL] [--baseline]
    saliency-evaluate linear    --encoder RUN --data URL --test-data URL
    saliency-evaluate detection --encoder RUN --dataset voc | coco --root FOLDER
    saliency-evaluate export    --encoder RUN --format torchvision | timm | safetensors | detectron2
    saliency-evaluate table     RUN ... [--protocol linear]

In a checkout `python -m train.evaluate` is the same. `--help` after a command lists its options.
Encoders that were trained with a high-pass recipe are evaluated on high-pass images. Each
evaluation adds a line to RUN/results.jsonl; `table` makes a Markdown table from such lines. `knn`,
`linear` and `detection` also run under torchrun.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import tyro

from schemas import UserError
from schemas.cli import parse, run, run_subcommand
from train.distributed import is_main
from train.evaluate import export, knn, linear, results, tables
from train.process_group import join_process_group, parse_on_all_ranks


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """Print a Markdown table of evaluations, and one by masked branch if runs differ in it."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = tyro.MISSING
    """Folders of runs, or folders that contain runs."""
    protocol: Literal["knn", "linear", "detection"] = "linear"
    """Kind of evaluation to show."""


def run_evaluation(
    options_class: type[Any], evaluate: Callable, format_result: Callable, argv: list[str]
) -> None:
    """Parse the options, evaluate on every rank, and print the result on rank 0."""
    options = parse_on_all_ranks(partial(parse, options_class, argv))
    with join_process_group(options.rank_timeout, options.device):
        result = evaluate(options)
        if is_main():
            print(format_result(result))


def evaluate_knn(argv: list[str]) -> None:
    run_evaluation(knn.KnnOptions, knn.evaluate, knn.format_table, argv)


def evaluate_linear(argv: list[str]) -> None:
    run_evaluation(linear.LinearOptions, linear.evaluate, linear.format_result, argv)


def evaluate_detection(argv: list[str]) -> None:
    from train.evaluate.detection import command  # slow: imports torchvision's detectors

    run_evaluation(command.DetectionOptions, command.evaluate, command.format_result, argv)


def write_export(argv: list[str]) -> None:
    print(export.export(parse(export.ExportOptions, argv)))


def show_table(argv: list[str]) -> None:
    options = parse(TableOptions, argv)
    rows = results.collect(options.runs)
    chosen = [row for row in rows if row["protocol"] == options.protocol]
    if not chosen:
        where = ", ".join(options.runs) or "no folder; name at least one"
        raise UserError(f"no {options.protocol} evaluation in {where}")
    if options.protocol == "detection":
        print(tables.format_detection_table(rows))
        return
    print(tables.format_table(rows, options.protocol))
    if len({tables.get_setting(row, "recipe.branch") for row in chosen}) > 1:
        for table in tables.format_branch_tables(rows, options.protocol):
            print(f"\n{table}")


COMMANDS = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "detection": evaluate_detection,
    "export": write_export,
    "table": show_table,
}


def main() -> None:
    run_subcommand(COMMANDS, __doc__)


def start() -> None:
    run(main, outlives_reader=True, decodes=True)


if __name__ == "__main__":
    start()
