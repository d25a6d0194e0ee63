"""A record of the shards verified so far, so that an interrupted verification can resume."""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TextIO

from schemas.errors import UserError
from schemas.tables import ShardRow


class Problem(NamedTuple):
    """One problem: `where` is a file, or a sample in a file; `what` says what is wrong with it."""

    where: str
    what: str


class VerifyRecord:
    """A JSON-lines file: one line for the dataset, then one per shard verified without a problem.

    Shards with problems are not recorded, so that they are read again.

    Args:
        path: the record, a local file; it is created if it does not exist. None for no record.
        digest: `ShardDataset.digest`.

    Raises:
        UserError: the record belongs to another dataset, or cannot be written.
    """

    def __init__(self, path: Path | None, digest: str):
        self.path, self.digest = path, digest
        self.clean: set[int] = set()
        self.file: TextIO | None = None

    def __enter__(self) -> "VerifyRecord":
        if self.path is None:
            return self
        try:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            self.clean = {shard for line in lines[1:] for shard in shards_of(line)}
            if lines and json.loads(lines[0]).get("dataset") != self.digest:
                raise UserError(
                    f"{self.path}: the record of another dataset, or of this one before it was "
                    "changed; delete it or choose another file"
                )
            self.file = self.path.open("a")
            if not lines:
                self.write({"dataset": self.digest})
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: cannot be used as a record ({error})") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file:
            self.file.close()

    def add(self, row: ShardRow, problems: Iterable[Problem]) -> None:
        """Record a shard that was read, if it has no problem."""
        if self.file and not list(problems):
            self.write({"shard": row.shard})

    def write(self, entry: dict[str, object]) -> None:
        assert self.file is not None
        self.file.write(f"\n{json.dumps(entry)}" if self.file.tell() else json.dumps(entry))
        self.file.flush()


def shards_of(line: str) -> list[int]:
    """Return the shard that a line records; an empty list for a line that was cut short."""
    try:
        return [int(json.loads(line)["shard"])]
    except (ValueError, KeyError, TypeError):
        return []
