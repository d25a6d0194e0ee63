"""Write the merged tables of a dataset row group by row group, and find repeated keys."""

import contextlib
from array import array
from collections.abc import Iterable
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.storage import Store
from schemas.tables import PARQUET_OPTIONS

ROW_GROUP = 1024 * 1024
"""Rows per row group: the number that `pyarrow.parquet.write_table` uses for a whole table, so that
both ways give the same bytes. This many rows are held in memory, about 200 MB of samples.
"""

SMALL_ROWS = 100
SMALL_TABLES = 256
"""Number of consecutive tables of fewer than SMALL_ROWS rows that are copied into one while they
wait for their row group, because each table needs about 15 KB however few rows it has. Larger
tables stay as they are: the copy would move the bounds of pages in the file.
"""


class TableWriter:
    """A parquet file of a store that grows table by table; readers see all of it or nothing.

    The file appears when the `with` block ends, and has the same bytes as `to_parquet` gives for
    all its rows together.

    Raises:
        UserError: no space left, or no permission; from every method.
    """

    def __init__(self, store: Store, name: str, schema: pa.Schema):
        self.schema = schema
        self.rows = 0
        self.waiting: list[pa.Table] = []
        self.waiting_rows = 0
        self.small_tables = 0
        self.groups = 0
        self.stream = store.write_stream(name)
        self.parquet = pq.ParquetWriter(self.stream, schema, **PARQUET_OPTIONS)

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table that has this schema."""
        if not len(table):
            return
        self.waiting.append(table)
        self.waiting_rows += len(table)
        self.rows += len(table)
        self.small_tables = self.small_tables + 1 if len(table) < SMALL_ROWS else 0
        if self.small_tables == SMALL_TABLES:
            copied = pa.concat_tables(self.waiting[-SMALL_TABLES:]).combine_chunks()
            self.waiting[-SMALL_TABLES:] = [copied]
            self.small_tables = 0
        while self.waiting_rows >= ROW_GROUP:
            joined = pa.concat_tables(self.waiting)
            self.write_group(joined.slice(0, ROW_GROUP))
            self.waiting = [joined.slice(ROW_GROUP)]
            self.waiting_rows -= ROW_GROUP
            self.small_tables = 0

    def write_group(self, table: pa.Table) -> None:
        self.parquet.write_table(table, ROW_GROUP)
        self.groups += 1

    def discard(self) -> None:
        """Stop writing and leave no file."""
        # An open writer would write its footer when it is garbage-collected. No file appears, so it
        # does not matter whether that write succeeds.
        with contextlib.suppress(Exception):
            self.parquet.close()
        self.stream.discard()

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.discard()
            return
        with self.stream:
            if self.waiting_rows or not self.groups:
                self.write_group(pa.concat_tables([self.schema.empty_table(), *self.waiting]))
            self.parquet.close()


class KeyHashes:
    """Find repeated keys among any number of keys, with 8 bytes of memory for each.

    A set of strings takes more than 100 bytes for each. Different keys may have the same hash, so
    `repeated` gives the hashes of candidates, which must then be compared as text.
    """

    def __init__(self) -> None:
        self.hashes = array("q")

    def add(self, keys: Iterable[str]) -> None:
        self.hashes.extend(map(hash, keys))

    def repeated(self) -> set[int]:
        """Return the hashes that occur more than once; no key can be added after that."""
        hashes = np.frombuffer(self.hashes, np.int64)
        hashes.sort()
        return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
