"""Files with one JSON object per line, to which a running job appends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


def read_json_lines(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a file, without a last line that a writer has not finished.

    Args:
        skip_damaged: leave out every line that is not a JSON object, for a reader whose result
            stays correct without it.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a JSON object.
    """
    content = path.read_bytes()
    rows = []
    for line in content[: len(content) - len(find_unfinished(content))].splitlines():
        try:
            rows.append(parse_object(line))
        except ValueError:
            if not skip_damaged:
                raise
    return rows


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object, replacing a line that a killed writer left unfinished.

    Raises:
        OSError: the file cannot be written.
    """
    with open_to_append(path) as file:
        write_json_line(file, row)


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for `write_json_line`, without a line that a killed writer left unfinished.

    Raises:
        OSError: the file cannot be written.
    """
    file = path.open("ab+")
    try:
        file.seek(0)
        content = file.read()
        unfinished = find_unfinished(content)
        if unfinished:
            file.truncate(len(content) - len(unfinished))
        elif content and not content.endswith(b"\n"):
            file.write(b"\n")
    except BaseException:
        file.close()
        raise
    return file


def write_json_line(file: BinaryIO, row: Mapping[str, Any]) -> None:
    """Write one object and flush it, so that a killed writer loses at most the line in progress."""
    file.write(json.dumps(row).encode() + b"\n")
    file.flush()


def find_unfinished(content: bytes) -> bytes:
    """Return the part after the last line break if it is not a whole object, otherwise b\"\"."""
    last = content[content.rfind(b"\n") + 1 :]
    try:
        parse_object(last)
    except ValueError:
        return last
    return b""


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the object of a line.

    Raises:
        ValueError: the line is not a JSON object.
    """
    try:
        row = json.loads(line)
    except RecursionError as error:  # damage may look like thousands of nested lists
        raise ValueError(f"not a JSON object: {line[:40]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {line[:40]!r}")
    return row
