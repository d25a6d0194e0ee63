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
    text = path.read_text()
    lines = text[: len(text) - len(find_unfinished(text))].splitlines()
    return [json.loads(line) for line in lines]


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object, in place of a line that a killed writer left unfinished.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a+") as file:
        file.seek(0)
        text = file.read()
        unfinished = find_unfinished(text)
        if unfinished:
            file.truncate(len(text.encode()) - len(unfinished.encode()))
        elif text and not text.endswith("\n"):
            file.write("\n")
        file.write(json.dumps(row) + "\n")


def find_unfinished(text: str) -> str:
    """Return the part after the last line break if it is not a whole object, otherwise \"\"."""
    last = text[text.rfind("\n") + 1 :]
    try:
        json.loads(last)
    except ValueError:
        return last
    return ""
