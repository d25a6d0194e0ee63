"""Results: one line of JSON for each finished evaluation.

RUN/results.jsonl lies beside the encoder. A row says what was evaluated (encoder, method, recipe,
pretraining: the encoder's metadata), on what (data, its digest, numbers of images), how (protocol
and its settings) and what came out (`accuracy`: name -> share, 0 to 1).
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from schemas import UserError

RESULTS = "results.jsonl"
OUTCOMES = {"accuracy", "best_epoch", "time"}
"""What comes out of an evaluation; all else in a row says what was done."""

Row = dict[str, Any]


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
) -> Row:
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


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Add rows to those of a folder."""
    with (folder / RESULTS).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def collect(folders: Iterable[str]) -> list[Row]:
    """The rows of runs, or of folders of runs; of equal evaluations of one encoder the last.

    Raises:
        UserError: a folder has none.
    """
    latest: dict[tuple[Path, str], Row] = {}
    for folder in folders:
        files = sorted(Path(folder).rglob(RESULTS))
        if not files:
            raise UserError(f"{folder}: no {RESULTS} in it; evaluate an encoder first")
        for path in files:
            for line in path.read_text().splitlines():
                row = json.loads(line)
                latest[path, what_was_done(row)] = row
    return list(latest.values())


def what_was_done(row: Row) -> str:
    """A row without what came out of it: equal for equal evaluations."""
    return json.dumps({key: row[key] for key in row.keys() - OUTCOMES}, sort_keys=True)
