"""A record of the shards verified so far, so that an interrupted verification can resume."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from schemas.errors import UserError
from schemas.json_lines import open_to_append, parse_object, read_json_lines, write_json_line
from schemas.tables import ShardRow


class Problem(NamedTuple):
    """One problem: `where` is a file, or a sample in a file; `what` says what is wrong with it."""

    where: str
    what: str


class VerifyRecord:
    """A JSON-lines file: one line for the dataset, then one per shard verified without a problem.

    Shards with problems are not recorded, so that they are read again; so is a shard whose line is
    damaged. A file that does not begin with this dataset is a foreign one, which is never
    overwritten.

    Args:
        path: the record, a local file; it is created if it does not exist. None for no record.
        digest: `ShardDataset.digest`.

    Raises:
        UserError: the file is not a record of this dataset, or cannot be written.
    """

    def __init__(self, path: Path | None, digest: str):
        self.path, self.digest = path, digest
        self.clean: set[int] = set()
        self.file: BinaryIO | None = None

    def __enter__(self) -> "VerifyRecord":
        if self.path is None:
            return self
        header = {"dataset": self.digest}
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            # a run that was killed while it wrote the first line has verified nothing
            has_begun = not json.dumps(header)[:-1].encode().startswith(content)
            rows = read_json_lines(self.path, skip_damaged=True) if has_begun else []
            if has_begun and parse_object(content.partition(b"\n")[0]) != header:
                raise UserError(
                    f"{self.path}: not a record of this dataset, or one from before it was "
                    "changed; delete it or choose another file"
                )
            self.clean = {row["shard"] for row in rows if type(row.get("shard")) is int}
            self.file = open_to_append(self.path)
            if not has_begun:
                write_json_line(self.file, header)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be used as a record ({error})") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.file:
            with suppress(OSError):  # `add`, which flushes each line, has reported a full disk
                self.file.close()

    def add(self, row: ShardRow, problems: Iterable[Problem]) -> None:
        """Record a shard that was read, if it has no problem."""
        if self.file and not list(problems):
            try:
                write_json_line(self.file, {"shard": row.shard})
            except OSError as error:
                raise UserError(f"{self.path}: the record cannot be written ({error})") from error
