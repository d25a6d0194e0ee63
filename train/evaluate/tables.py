"""The paper's tables, as Markdown, made of finished evaluations.

A line is a training, whatever its seed: runs that differ in anything else stand in lines of their
own, and the line says in what. A column is a dataset, and likewise a protocol's settings.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from schemas.settings import filled
from train.config import default_settings
from train.evaluate.results import OUTCOMES, Row
from train.methods import METHODS

HEADLINE = {"knn": "20", "linear": "top1"}
"""The accuracy of a protocol that a table shows."""
BRANCHES = ("key", "both", "query")
OF_THE_PROTOCOL = {"seed", "protocol", "data", "pretraining"} | OUTCOMES
OF_THE_TRAINING = {"encoder", "method", "recipe", "high_pass", "crop_size", "weights"}


def table(rows: Sequence[Row], protocol: str) -> str:
    """Top-1 by training and dataset; mean ± standard deviation over several seeds."""
    chosen = [row for row in rows if row["protocol"] == protocol]
    lines, columns = labels(chosen, training, name_of), labels(chosen, protocol_of, data_of)
    heads = list(dict.fromkeys(columns))
    text = [
        f"| {protocol}, top-1 % | {' | '.join(heads)} | runs |",
        "| --- |" + " ---: |" * (len(heads) + 1),
    ]
    for line in dict.fromkeys(lines):
        mine = [place for place, other in enumerate(lines) if other == line]
        cells = [
            spread([headline(chosen[place]) for place in mine if columns[place] == head])
            for head in heads
        ]
        runs = {chosen[place]["pretraining"]["seed"] for place in mine}
        text.append(f"| {line} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(text)


def detection_table(rows: Sequence[Row]) -> str:
    """AP, AP50 and AP75 of boxes and masks by training; the paper's second table."""
    chosen = [row for row in rows if row["protocol"] == "detection"]
    lines, columns = labels(chosen, training, name_of), labels(chosen, protocol_of, data_of)
    found: dict[tuple[str, str, str], list[float]] = {}
    for row, line, column in zip(chosen, lines, columns, strict=True):
        for score, value in row["accuracy"].items():
            found.setdefault((line, column, score), []).append(100 * value)
    heads = list(dict.fromkeys((column, score) for _, column, score in found))
    told = " | ".join(f"{column} {score.replace('_', ' ')}" for column, score in heads)
    text = [
        f"| detection, % | {told} |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for line in dict.fromkeys(lines):
        cells = [spread(found.get((line, *head), [])) for head in heads]
        text.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(text)


def branch_table(rows: Sequence[Row], protocol: str, data: str) -> str:
    """The ablation "manipulating variance": trainings against the branch that they mask.

    Lines are trainings that were made with several branches and, in the first column as in the
    poster, those of the same methods without any mask.
    """
    chosen = [row for row in rows if row["protocol"] == protocol and row["data"] == data]
    lines = labels(chosen, apart_from_branch, lambda row: name_of(row, branch=False))
    branches: dict[str, set[str]] = {}
    for row, line in zip(chosen, lines, strict=True):
        branches.setdefault(line, set()).add(branch_of(row))
    methods = {
        method_of(row) for row, line in zip(chosen, lines, strict=True) if len(branches[line]) > 1
    }
    text = [
        f"| {data}, {protocol}, top-1 % | {' | '.join(BRANCHES)} |",
        "| --- | ---: | ---: | ---: |",
    ]
    for line in dict.fromkeys(lines):
        mine = [row for row, other in zip(chosen, lines, strict=True) if other == line]
        plain = fill_of(mine[0]) == "none" and method_of(mine[0]) in methods
        if len(branches[line]) > 1 or plain:
            cells = [
                spread([headline(row) for row in mine if branch_of(row) == branch])
                for branch in BRANCHES
            ]
            text.append(f"| {line} | {' | '.join(cells)} |")
    return "\n".join(text)


def labels(
    rows: Sequence[Row], settings_of: Callable[[Row], dict[str, Any]], name: Callable[[Row], str]
) -> list[str]:
    """A name for each row; rows of one name and other settings are told apart by these."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(name(row), []).append(settings_of(row))
    found = []
    for row in rows:
        own, others = settings_of(row), alike[name(row)]
        differing = sorted(key for key in own if any(o.get(key) != own[key] for o in others))
        found.append(", ".join([name(row), *(f"{key} {shown(own[key])}" for key in differing)]))
    return found


def shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)[:12]


def training(row: Row) -> dict[str, Any]:
    """All settings of the encoder's training but its seed; of an untrained one, what it is."""
    if row.get("weights") == "untrained":
        return {"encoder": row["encoder"]}
    return {name: value for name, value in settings(row).items() if name != "seed"}


def apart_from_branch(row: Row) -> dict[str, Any]:
    return {name: value for name, value in training(row).items() if name != "recipe.branch"}


def protocol_of(row: Row) -> dict[str, Any]:
    """How a row was evaluated, but for the seed."""
    return {key: row[key] for key in row.keys() - OF_THE_PROTOCOL - OF_THE_TRAINING}


def name_of(row: Row, branch: bool = True) -> str:
    """A line of a table: method, recipe, masked branch and hard negatives."""
    if row.get("weights") == "untrained":
        return f"untrained {row['encoder']}"
    name = f"{method_of(row)}, {row['recipe']}"
    if fill_of(row) != "none":
        name += (
            f", {branch_of(row)} masked" * branch
            + f", {setting(row, 'recipe.hard_negatives')} hard"
        )
    return name


def method_of(row: Row) -> str:
    objective = setting(row, "method.objective")
    return f"{row['method']} on {objective}" if objective else str(row["method"])


def data_of(row: Row) -> str:
    return str(row["data"])


def fill_of(row: Row) -> str:
    return str(setting(row, "recipe.fill"))


def branch_of(row: Row) -> str:
    """The masked branch; a baseline without masks stands in the first column, as in the poster."""
    return BRANCHES[0] if fill_of(row) == "none" else str(setting(row, "recipe.branch"))


def setting(row: Row, name: str) -> Any:
    """A setting of the encoder's training."""
    return settings(row).get(name)


def settings(row: Row) -> dict[str, Any]:
    """All settings of the encoder's training; those newer than it have their defaults."""
    saved = json.loads(row["pretraining"].get("settings", "{}"))
    method = METHODS.get(str(row["method"]))
    return filled(saved, default_settings(method)) if saved and method else saved


def headline(row: Row) -> float:
    """The accuracy that stands for a row, in %; of several neighbourhoods the smallest."""
    accuracy = row["accuracy"]
    name = HEADLINE[row["protocol"]]
    return 100 * (accuracy[name] if name in accuracy else next(iter(accuracy.values())))


def spread(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
