"""Results: one line of JSON for each finished evaluation, and the paper's tables made of them.

RUN/results.jsonl lies beside the encoder. A row says what was evaluated (encoder, method, recipe,
pretraining: the encoder's metadata), on what (data, its digest, numbers of images), how (protocol
and its settings) and what came out (`accuracy`: name -> share, 0 to 1).
"""

import json
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from schemas import UserError

RESULTS = "results.jsonl"
HEADLINE = {"knn": "20", "linear": "top1"}
"""The accuracy of a protocol that a table shows."""
BRANCHES = ("key", "both", "query")


class Measured(Protocol):
    """A set of images as a row names it; `len` of it is their number."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...


def row_of(
    protocol: str,
    metadata: dict[str, str],
    train: Measured,
    test: Measured | None,
    accuracy: dict[str, float],
    **settings: Any,
) -> dict[str, Any]:
    """One evaluation as a row."""
    return {
        "protocol": protocol,
        "accuracy": {name: round(value, 6) for name, value in accuracy.items()},
        "data": train.name,
        "data_digest": train.digest,
        "train_images": len(train),
        "test_digest": None if test is None else test.digest,
        "test_images": len(train if test is None else test),
        "encoder": metadata["encoder"],
        "method": metadata.get("method"),
        "recipe": metadata.get("recipe"),
        "high_pass": metadata["high_pass"] == "True",
        "crop_size": int(metadata["crop_size"]),
        "pretraining": metadata,
        **settings,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to those of a folder."""
    with (folder / RESULTS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def collect(folders: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of runs, or of folders of runs; of equal evaluations of one encoder the last.

    Raises:
        UserError: a folder has none.
    """
    latest: dict[tuple, dict[str, Any]] = {}
    for folder in folders:
        files = sorted(Path(folder).rglob(RESULTS))
        if not files:
            raise UserError(f"{folder}: no {RESULTS} in it; evaluate an encoder first")
        for path in files:
            for line in path.read_text().splitlines():
                row = json.loads(line)
                which = (path, row["protocol"], row["data_digest"], row["test_digest"])
                latest[which, row.get("weights")] = row
    return list(latest.values())


def table(rows: list[dict[str, Any]], protocol: str) -> str:
    """Top-1 by method and dataset, as Markdown; mean ± standard deviation over several seeds."""
    chosen = [row for row in rows if row["protocol"] == protocol]
    datasets = list(dict.fromkeys(row["data"] for row in chosen))
    methods = list(dict.fromkeys(name_of(row) for row in chosen))
    lines = [
        f"| {protocol}, top-1 % | {' | '.join(datasets)} | runs |",
        "| --- |" + " ---: |" * (len(datasets) + 1),
    ]
    for method in methods:
        cells = []
        for data in datasets:
            found = [r for r in chosen if name_of(r) == method and r["data"] == data]
            cells.append(spread([headline(row) for row in found]))
        runs = {r["pretraining"]["seed"] for r in chosen if name_of(r) == method}
        lines.append(f"| {method} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def detection_table(rows: list[dict[str, Any]]) -> str:
    """AP, AP50 and AP75 of boxes and masks by method, as Markdown; the paper's second table."""
    chosen = [row for row in rows if row["protocol"] == "detection"]
    columns = list(dict.fromkeys((row["data"], name) for row in chosen for name in row["accuracy"]))
    heads = " | ".join(f"{data} {name.replace('_', ' ')}" for data, name in columns)
    lines = [f"| detection, % | {heads} |", "| --- |" + " ---: |" * len(columns)]
    for method in dict.fromkeys(name_of(row) for row in chosen):
        cells = [
            spread(
                [
                    100 * row["accuracy"][name]
                    for row in chosen
                    if name_of(row) == method and row["data"] == data and name in row["accuracy"]
                ]
            )
            for data, name in columns
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def branch_table(rows: list[dict[str, Any]], protocol: str, data: str) -> str:
    """The ablation "manipulating variance": recipes against the branch that is masked."""
    chosen = [r for r in rows if r["protocol"] == protocol and r["data"] == data]
    chosen = [r for r in chosen if setting(r, "recipe.branch") is not None]
    recipes = list(dict.fromkeys(row["recipe"] for row in chosen))
    lines = [
        f"| {data}, {protocol}, top-1 % | {' | '.join(BRANCHES)} |",
        "| --- | ---: | ---: | ---: |",
    ]
    for recipe in recipes:
        cells = [
            spread(
                [
                    headline(row)
                    for row in chosen
                    if row["recipe"] == recipe and branch_of(row) == branch
                ]
            )
            for branch in BRANCHES
        ]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def name_of(row: dict[str, Any]) -> str:
    """A line of the table: method, recipe, masked branch and hard negatives."""
    if row.get("weights") == "untrained":
        return f"untrained {row['encoder']}"
    objective = setting(row, "method.objective")
    on = f" on {objective}" if objective else ""
    name = f"{row['method']}{on}, {row['recipe']}"
    branch, many = setting(row, "recipe.branch"), setting(row, "recipe.hard_negatives")
    if fill_of(row) != "none":
        name += f", {branch} masked, {many} hard"
    return name


def fill_of(row: dict[str, Any]) -> str:
    return str(setting(row, "recipe.fill"))


def branch_of(row: dict[str, Any]) -> str:
    """The masked branch; a baseline without masks stands in the first column, as in the poster."""
    return BRANCHES[0] if fill_of(row) == "none" else str(setting(row, "recipe.branch"))


def setting(row: dict[str, Any], name: str) -> Any:
    """A setting of the encoder's training."""
    return json.loads(row["pretraining"].get("settings", "{}")).get(name)


def headline(row: dict[str, Any]) -> float:
    """The accuracy that stands for a row, in %; of several neighbourhoods the smallest."""
    accuracy = row["accuracy"]
    name = HEADLINE[row["protocol"]]
    return 100 * (accuracy[name] if name in accuracy else next(iter(accuracy.values())))


def spread(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
