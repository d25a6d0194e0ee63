"""Results of evaluations: one JSON line each in RUN/results.jsonl, next to the encoder.

A row says what was evaluated (encoder, method, recipe, pretraining: the encoder's metadata), on
what (data, its digest, numbers of images), how (protocol and its settings) and with which result
(`accuracy`: name -> share, 0 to 1).
"""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from schemas import UserError
from schemas.json_lines import append_json_line, read_json_lines
from train.run_info import RESULTS

OUTCOMES = {"accuracy", "best_epoch", "time"}
"""Fields of a row that hold its outcome; all others say what was done."""

Row = dict[str, Any]


class ImageSet(Protocol):
    """A set of images with its title, digest and number of images."""

    @property
    def title(self) -> str: ...
    @property
    def digest(self) -> str: ...
    def __len__(self) -> int: ...


def build_row(
    protocol: str,
    metadata: dict[str, str],
    train: ImageSet,
    test: ImageSet | None,
    accuracy: dict[str, float],
    **settings: Any,
) -> Row:
    """Build the row of one evaluation; without a test set it is leave-one-out."""
    return {
        "protocol": protocol,
        "accuracy": {name: round(value, 6) for name, value in accuracy.items()},
        "data": train.title,
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


def check_writable(folder: Path) -> None:
    """Check that results can be written to a folder, before the work that they cost is done.

    Raises:
        UserError: they cannot.
    """
    path = folder / RESULTS
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(
            f"{path}: no permission to write the result there; copy the encoder to a folder that "
            "you may write to"
        )


def append(folder: Path, rows: Iterable[Row]) -> None:
    """Append rows to the results of a folder."""
    for row in rows:
        append_json_line(folder / RESULTS, row)


def collect(folders: Iterable[str]) -> list[Row]:
    """Return the rows of all runs in the folders; the last one of equal evaluations counts.

    Raises:
        UserError: a folder has no results.
    """
    latest: dict[tuple[Path, str], Row] = {}
    for folder in folders:
        files = sorted(Path(folder).rglob(RESULTS))
        if not files:
            raise UserError(f"{folder}: no {RESULTS} in it; evaluate an encoder first")
        for path in files:
            for row in read_json_lines(path):
                latest[path, identify(row)] = row
    return list(latest.values())


def identify(row: Row) -> str:
    """Return a row without its outcome, as text: equal for equal evaluations."""
    return json.dumps({key: row[key] for key in row.keys() - OUTCOMES}, sort_keys=True)
