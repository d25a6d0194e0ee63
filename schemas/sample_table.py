"""The table with one row per sample of a dataset, read in parts and only when they are needed."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import FormatError
from schemas.parallel import map_ahead
from schemas.storage import Store
from schemas.tables import (
    MERGED_SAMPLES,
    SAMPLES,
    SAMPLES_SCHEMA,
    ShardRow,
    find_columns,
    open_parquet,
    read_columns,
    read_table,
    shard_name,
)

READERS = 16
"""Number of parts read in parallel: enough to hide the latency of an object store."""
KEPT_PARTS = 2
"""Number of parts kept in memory: consecutive shards lie in one part or in two."""


class Part(NamedTuple):
    """A row group of samples.parquet, or a shard's own table: `rows` rows from row `start`."""

    number: int
    start: int
    rows: int


class SampleTable:
    """One row per sample, in the order on disk, with the columns of `SAMPLES_SCHEMA`.

    `table["label"]` reads that column alone; `batches` and `rows` read one part at a time.
    Everything else that a `pyarrow.Table` offers (`filter`, `slice`, `to_pylist` ...) works too, on
    the whole table, which is then read into memory: about 200 bytes per sample.

    The rows come from samples.parquet. A dataset of more than `MERGED_SAMPLES` samples has no such
    file; its rows come from the parquet files of the shards.

    Args:
        samples: number of samples according to the card.
        shards: the rows of shards.parquet.

    Attributes:
        stored: names of the columns that samples.parquet has; the others have their defaults here.

    Raises:
        FormatError: a file is missing, damaged, or of another format; also from every method.
    """

    schema = SAMPLES_SCHEMA

    def __init__(self, store: Store, samples: int, shards: Sequence[ShardRow]):
        self.store, self.samples, self.shards = store, samples, shards
        self.is_merged = samples <= MERGED_SAMPLES
        self.columns: dict[str, pa.ChunkedArray] = {}
        self.recent: OrderedDict[int, pa.Table] = OrderedDict()
        self.lock = threading.Lock()
        self.stored = SAMPLES_SCHEMA.names
        if self.is_merged:
            self.stored = find_columns(self.file, SAMPLES_SCHEMA, self.location)
            groups = range(self.file.num_row_groups)
            sizes = [self.file.metadata.row_group(group).num_rows for group in groups]
        else:
            sizes = [row.samples for row in shards]
        starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.starts = starts
        self.parts = [
            Part(number, int(starts[number]), rows) for number, rows in enumerate(sizes) if rows
        ]

    @property
    def location(self) -> str:
        return self.store.location(SAMPLES)

    @cached_property
    def file(self) -> pq.ParquetFile:
        """samples.parquet, opened by reading its footer."""
        try:
            return open_parquet(self.store.read_ranges(SAMPLES), self.location)
        except FileNotFoundError as error:
            raise FormatError(f"{self.location}: missing; the dataset is damaged") from error

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_rows(self) -> int:
        return len(self)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        """Return one column, which is kept in memory."""
        if name not in self.columns:
            self.columns[name] = self.to_table([name]).column(0)
        return self.columns[name]

    def __reduce__(self) -> tuple:
        # another process reads the file again
        return SampleTable, (self.store, self.samples, self.shards)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Export the whole table to Polars, DuckDB and others without copying it."""
        return self.whole.__arrow_c_stream__(requested_schema)

    @cached_property
    def whole(self) -> pa.Table:
        """All rows and columns, read into memory."""
        return self.to_table()

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of the given columns; by default of all columns."""
        schema = self.select_schema(columns)
        return pa.concat_tables([schema.empty_table(), *self.batches(columns)])

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows part by part, in order: at most 1,048,576 rows, or one shard, each."""
        schema = self.select_schema(columns)
        if self.is_merged:  # Arrow reads one part of a file at a time
            yield from (self.read(part, schema) for part in self.parts)
        else:
            yield from map_ahead(lambda part: self.read(part, schema), self.parts, READERS)

    def rows(self, start: int, stop: int) -> pa.Table:
        """Return the rows from `start` up to `stop`; keep the latest parts in memory for later
        calls.
        """
        tables = [SAMPLES_SCHEMA.empty_table()]
        first = int(np.searchsorted([part.start for part in self.parts], start, "right")) - 1
        for part in self.parts[max(first, 0) :]:
            if part.start >= stop:
                break
            begin, end = max(start - part.start, 0), min(stop - part.start, part.rows)
            if begin < end:
                tables.append(self.read_recent(part).slice(begin, end - begin))
        return pa.concat_tables(tables)

    def ranges(self) -> dict[int, tuple[int, int]]:
        """Return the (start, stop) rows of each shard.

        Raises:
            FormatError: the rows of a shard are not contiguous.
        """
        if not self.is_merged:
            ends = (int(self.starts[place + 1]) for place in range(len(self.shards)))
            return {
                row.shard: (end - row.samples, end)
                for row, end in zip(self.shards, ends, strict=True)
            }
        ranges: dict[int, tuple[int, int]] = {}
        place = 0
        for batch in self.batches(["shard"]):
            shards = batch.column(0).to_numpy()
            if not len(shards):  # in a damaged file
                continue
            cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(shards)]
            for begin, end in itertools.pairwise(cuts):
                shard = int(shards[begin])
                start, stop = ranges.get(shard, (place + begin, place + begin))
                if stop != place + begin:
                    raise FormatError(f"{self.location}: the rows of shard {shard} lie apart")
                ranges[shard] = (start, place + end)
            place += len(shards)
        return ranges

    def select_schema(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return SAMPLES_SCHEMA
        return pa.schema([SAMPLES_SCHEMA.field(name) for name in columns])

    def read_recent(self, part: Part) -> pa.Table:
        """Return all columns of a part, and keep it in memory for threads that need it next."""
        with self.lock:
            if part.number not in self.recent:
                self.recent[part.number] = self.read(part, SAMPLES_SCHEMA)
                if len(self.recent) > KEPT_PARTS:
                    self.recent.popitem(last=False)
            return self.recent[part.number]

    def read(self, part: Part, schema: pa.Schema) -> pa.Table:
        if self.is_merged:
            table = read_columns(self.file, schema, self.location, part.number)
            return table.replace_schema_metadata(None)
        name = shard_name(self.shards[part.number].shard, "parquet")
        table = read_table(self.store, name, schema)
        if len(table) != part.rows:
            raise FormatError(
                f"{self.store.location(name)}: {len(table)} rows, the table of shards says "
                f"{part.rows}"
            )
        return table.replace_schema_metadata(None)
