"""Files with one JSON object per line, to which a running job appends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, without a last line that a writer has not finished.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON.
    """
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object. Raises OSError."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
