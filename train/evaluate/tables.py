"""Markdown tables of finished evaluations, laid out as in the paper.

A line is a run, or several that differ only in the seed; runs that differ in anything else have
separate lines that name the difference. A column is a dataset, divided in the same way by the
settings of the protocol.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from schemas.settings import fill_defaults
from train.config import collect_default_settings, use_current_names
from train.evaluate.results import OUTCOMES, Row
from train.methods import METHODS

HEADLINE = {"knn": "20", "linear": "top1"}
"""Accuracy of each protocol that a table shows."""
BRANCHES = ("key", "both", "query")
NEUTRAL_FIELDS = {"seed", "protocol", "data", "pretraining"} | OUTCOMES
"""Fields of a row that never tell columns apart: outcomes, or already part of the heading."""
TRAINING_FIELDS = {"encoder", "method", "recipe", "high_pass", "crop_size", "weights"}
"""Fields of a row that describe the run of the encoder, not the protocol."""

DIGEST = re.compile("[0-9a-f]{64}")

ARCHITECTURE = {"stem": "imagenet", "zero_init_residual": "False"}
"""Fields of an encoder's metadata, besides its name, that an untrained one depends on, and the
values that older files stand for."""


def format_table(rows: Sequence[Row], protocol: str) -> str:
    """Format top-1 by run and dataset; mean ± standard deviation over several seeds."""
    chosen = drop_repetitions([row for row in rows if row["protocol"] == protocol])
    lines = label_rows(chosen, get_training_settings, name_run)
    columns = label_rows(chosen, get_protocol_settings, get_data)
    heads = list(dict.fromkeys(columns))
    text = [
        f"| {protocol}, top-1 % | {' | '.join(heads)} | runs |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for line in dict.fromkeys(lines):
        members = [index for index, label in enumerate(lines) if label == line]
        cells = [
            format_spread([get_headline(chosen[i]) for i in members if columns[i] == head])
            for head in heads
        ]
        runs = {get_weights_seed(chosen[index]) for index in members}
        text.append(f"| {line} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(text)


def format_detection_table(rows: Sequence[Row]) -> str:
    """Format AP, AP50 and AP75 of boxes and masks by run; the paper's second table."""
    chosen = [row for row in rows if row["protocol"] == "detection"]
    lines = label_rows(chosen, get_training_settings, name_run)
    columns = label_rows(chosen, get_protocol_settings, get_data)
    scores: dict[tuple[str, str, str], list[float]] = {}
    for row, line, column in zip(chosen, lines, columns, strict=True):
        for score, value in row["accuracy"].items():
            scores.setdefault((line, column, score), []).append(100 * value)
    heads = list(dict.fromkeys((column, score) for _, column, score in scores))
    titles = " | ".join(f"{column} {score.replace('_', ' ')}" for column, score in heads)
    text = [
        f"| detection, % | {titles} |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for line in dict.fromkeys(lines):
        cells = [format_spread(scores.get((line, *head), [])) for head in heads]
        text.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(text)


def format_branch_tables(rows: Sequence[Row], protocol: str) -> Iterator[str]:
    """Format the ablation "manipulating variance": runs by the branch that they mask.

    Yields a table for each column of `format_table` that has such runs. Lines are settings that
    were run with several branches and, in the first column as on the poster, those of the same
    methods without any mask. An untrained encoder has no branch.
    """
    trained = [row for row in rows if row["protocol"] == protocol and not is_untrained(row)]
    columns = label_rows(trained, get_protocol_settings, get_data)
    for column in dict.fromkeys(columns):
        chosen = [row for row, label in zip(trained, columns, strict=True) if label == column]
        if lines := format_branch_lines(chosen):
            head = [f"| {column}, {protocol}, top-1 % | {' | '.join(BRANCHES)} |"]
            yield "\n".join([*head, "| --- | ---: | ---: | ---: |", *lines])


def format_branch_lines(chosen: Sequence[Row]) -> list[str]:
    """Format the lines of a branch table for rows that one protocol made on one dataset."""
    labels = label_rows(
        chosen, get_settings_without_branch, lambda row: name_run(row, branch=False)
    )
    branches: dict[str, set[str]] = {}
    for row, label in zip(chosen, labels, strict=True):
        branches.setdefault(label, set()).add(get_branch(row))
    methods = {
        name_method(row)
        for row, label in zip(chosen, labels, strict=True)
        if len(branches[label]) > 1
    }
    lines = []
    for label, own_branches in branches.items():
        members = [row for row, own in zip(chosen, labels, strict=True) if own == label]
        is_baseline = get_fill(members[0]) == "none" and name_method(members[0]) in methods
        if len(own_branches) > 1 or is_baseline:
            cells = [
                format_spread([get_headline(row) for row in members if get_branch(row) == branch])
                for branch in BRANCHES
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def drop_repetitions(rows: Sequence[Row]) -> list[Row]:
    """Drop repeated evaluations of an untrained encoder, which was evaluated beside several runs.

    Their accuracies are equal, so a standard deviation over them would be 0.
    """
    distinct: dict[str, Row] = {}
    for number, row in enumerate(rows):
        name = str(number)
        if is_untrained(row):
            settings = [get_training_settings(row), get_protocol_settings(row)]
            name = json.dumps([*settings, row["data"], get_weights_seed(row)], sort_keys=True)
        distinct[name] = row
    return list(distinct.values())


def is_untrained(row: Row) -> bool:
    return row.get("weights") == "untrained"


def get_weights_seed(row: Row) -> str:
    """Return the seed of a run, or that from which the weights of an untrained encoder come."""
    return str(row["seed"] if is_untrained(row) else row["pretraining"]["seed"])


def label_rows(
    rows: Sequence[Row], read_settings: Callable[[Row], dict[str, Any]], name: Callable[[Row], str]
) -> list[str]:
    """Label each row; rows with the same name but other settings also show those settings."""
    settings_by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings_by_name.setdefault(name(row), []).append(read_settings(row))
    labels = []
    for row in rows:
        own, all_settings = read_settings(row), settings_by_name[name(row)]
        differing = sorted(key for key in own if any(o.get(key) != own[key] for o in all_settings))
        values = (f"{key} {format_value(own[key])}" for key in differing)
        labels.append(", ".join([name(row), *values]))
    return labels


def format_value(value: Any) -> str:
    """Return a setting as text; a digest is shortened, as its first digits tell it from others."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)[:12] if DIGEST.fullmatch(str(value)) else str(value)


def get_training_settings(row: Row) -> dict[str, Any]:
    """Return the settings of a run except its seed; an untrained encoder has those of its images.

    It shares nothing else with the run whose architecture it has.
    """
    if is_untrained(row):
        run = row["pretraining"]
        kernel = [run["high_pass_kernel"], run["high_pass_sigma"]] if row["high_pass"] else False
        return {
            **{"encoder": row["encoder"], "crop_size": row["crop_size"], "high_pass": kernel},
            **{name: run.get(name, default) for name, default in ARCHITECTURE.items()},
        }
    return {name: value for name, value in get_settings(row).items() if name != "seed"}


def get_settings_without_branch(row: Row) -> dict[str, Any]:
    settings = get_training_settings(row)
    return {name: value for name, value in settings.items() if name != "recipe.branch"}


def get_protocol_settings(row: Row) -> dict[str, Any]:
    """Return the settings of an evaluation except its seed."""
    return {key: row[key] for key in row.keys() - NEUTRAL_FIELDS - TRAINING_FIELDS}


def name_run(row: Row, branch: bool = True) -> str:
    """Name a run by method, recipe, masked branch and hard negatives."""
    if is_untrained(row):
        return f"untrained {row['encoder']}"
    name = f"{name_method(row)}, {row['recipe']}"
    if get_fill(row) != "none":
        name += (
            f", {get_branch(row)} masked" * branch
            + f", {get_setting(row, 'recipe.hard_negatives')} hard"
        )
    return name


def name_method(row: Row) -> str:
    objective = get_setting(row, "method.objective")
    return f"{row['method']} on {objective}" if objective else str(row["method"])


def get_data(row: Row) -> str:
    return str(row["data"])


def get_fill(row: Row) -> str:
    return str(get_setting(row, "recipe.fill"))


def get_branch(row: Row) -> str:
    """Return the masked branch; a baseline without masks counts as the first, as on the poster."""
    return BRANCHES[0] if get_fill(row) == "none" else str(get_setting(row, "recipe.branch"))


def get_setting(row: Row, name: str) -> Any:
    """Return one setting of the encoder's run."""
    return get_settings(row).get(name)


def get_settings(row: Row) -> dict[str, Any]:
    """Return all settings of the encoder's run; those newer than it have their defaults."""
    saved = use_current_names(json.loads(row["pretraining"].get("settings", "{}")))
    method = METHODS.get(str(row["method"]))
    return fill_defaults(saved, collect_default_settings(method)) if saved and method else saved


def get_headline(row: Row) -> float:
    """Return the main accuracy of a row in %; for kNN without k = 20, that of the first k."""
    accuracy = row["accuracy"]
    name = HEADLINE[row["protocol"]]
    return 100 * (accuracy[name] if name in accuracy else next(iter(accuracy.values())))


def format_spread(values: Iterable[float], digits: int = 2) -> str:
    """Return mean and standard deviation as text; "" for no values."""
    values = list(values)
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
