"""The tables beside the shards, and the card that marks the dataset as complete."""

import dataclasses
import functools
import io
import json
import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import FormatError
from schemas.names import to_bytes, to_stored
from schemas.storage import Store

log = logging.getLogger(__name__)

FORMAT_VERSION = 1

CARD = "dataset.json"
SAMPLES = "samples.parquet"
SHARDS = "shards.parquet"
REJECTS = "rejects.parquet"
SHARD_FOLDER = "shards"

SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("index", pa.int32()),  # position within its shard, from 0
        ("label", pa.int32()),  # -1 for no label
        ("height", pa.int32()),  # pixels, after the EXIF orientation is applied
        ("width", pa.int32()),
        ("image_bytes", pa.int64()),
        ("image_sha256", pa.string()),
        ("saliency_min", pa.float32()),
        ("saliency_max", pa.float32()),
        ("foreground", pa.float32()),  # share of the map's cells, see saliency.py
        ("source", pa.string()),  # relative to the source's root
        ("reencoded", pa.bool_()),
    ]
)
SHARDS_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("samples", pa.int32()),
        ("bytes", pa.int64()),  # size of the tar
        ("sha256", pa.string()),  # hash of the tar
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
MERGED_SAMPLES = 10**8
"""Number of samples above which a dataset has no samples.parquet (it would exceed 8 GB): the rows
are then only in the shards' own tables. (Our choice.)
"""
OPTIONAL_COLUMNS: dict[str, Any] = {
    "foreground": None,  # can be computed from the map
    "source": "",
    "reencoded": False,
    "detail": "",
}
"""Columns that may be missing in a file, and the value that replaces each."""
REQUIRED_COLUMNS = {
    *(SAMPLES_SCHEMA.names + SHARDS_SCHEMA.names + REJECTS_SCHEMA.names)
} - OPTIONAL_COLUMNS.keys()
"""The other columns of a dataset's tables; each of their rows has a value."""


class ShardRow(NamedTuple):
    """One row of shards.parquet."""

    shard: int
    samples: int
    bytes: int
    sha256: str


class Reject(NamedTuple):
    """One row of rejects.parquet: an input that was not written.

    `reason` is a short fixed word for counting, `detail` a line that explains it to the user.
    """

    source: str
    reason: str
    detail: str = ""


def build_stored_reject(reject: Reject) -> Reject:
    """Return the reject in the form that the table stores: in UTF-8, its detail on one line."""
    detail = " ".join(to_bytes(reject.detail).decode("utf-8", "backslashreplace").split())
    return Reject(to_stored(reject.source), reject.reason, detail)


def shard_name(shard: int, suffix: str) -> str:
    """Return the name of a shard's file: `shard_name(3, "tar")` is `shards/000003.tar`."""
    return f"{SHARD_FOLDER}/{shard:06d}.{suffix}"


PARQUET_OPTIONS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""Options of all tables. A damaged page without a checksum may be read as other values."""


DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for a damaged file: OSError is also its own, for bad metadata."""


def build_table(rows: list[ShardRow] | list[Reject], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=schema)


def to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **PARQUET_OPTIONS)
    return sink.getvalue()


def from_parquet(
    content: bytes,
    schema: pa.Schema,
    location: str,
    required: Container[str] = REQUIRED_COLUMNS,
) -> pa.Table:
    """Read the columns of `schema`, in its order, from the content of a parquet file.

    Raises:
        FormatError: see `read_columns`.
    """
    file = open_parquet(pa.BufferReader(content), location)
    return read_columns(file, schema, location, required=required)


def read_table(store: Store, name: str, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema` from a table of a dataset.

    Raises:
        FormatError: the table is missing; or see `read_columns`.
        UserError: the table cannot be read.
    """
    location = store.location(name)
    try:
        with store.translate_read_errors(name):
            content = store.read(name)
    except FileNotFoundError as error:
        raise FormatError(f"{location}: missing; the dataset is damaged") from error
    return from_parquet(content, schema, location)


def open_parquet(source: Any, location: str) -> pq.ParquetFile:
    """Read the footer of a parquet file. Raises FormatError if it is not one.

    Args:
        source: a `pyarrow.BufferReader` or a `RangeReader`.
        location: name of the file, for messages.
    """
    try:
        # Without pre_buffer: Arrow would read a Python file in a separate thread, which aborts
        # the process (apache/arrow#34314) if it releases the file while Python exits.
        return pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
    except DAMAGE as error:
        raise FormatError(f"{location}: not a readable parquet file ({error})") from error


def read_columns(
    file: pq.ParquetFile,
    schema: pa.Schema,
    location: str,
    row_group: int | None = None,
    required: Container[str] = REQUIRED_COLUMNS,
) -> pa.Table:
    """Read the columns of `schema`, in its order, from a row group or from the whole file.

    Columns that this version does not know are not read. A missing column of OPTIONAL_COLUMNS gets
    its default, which is logged. Types of other widths are converted if no value changes.

    Args:
        required: columns that must have a value in each row.

    Raises:
        FormatError: the file is damaged, or a column is missing or of another type, or a value of a
            required column is missing.
    """
    names = find_columns(file, schema, location)
    groups = range(file.num_row_groups) if row_group is None else [row_group]
    try:
        table = file.read_row_groups(groups, columns=names, use_threads=False)
    except DAMAGE as error:
        raise FormatError(f"{location}: not a readable parquet file ({error})") from error
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    columns = []
    for wanted in schema:
        if wanted.name not in names:
            value = OPTIONAL_COLUMNS[wanted.name]
            columns.append(pa.array([value] * rows, wanted.type))
            continue
        if wanted.name in required and table.column(wanted.name).null_count:
            raise FormatError(f"{location}: a value of {wanted.name} is missing")
        try:
            columns.append(table.column(wanted.name).cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise FormatError(
                f"{location}: its column {wanted.name} is not {wanted.type} ({error})"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema.with_metadata(file.schema_arrow.metadata))


def find_columns(file: pq.ParquetFile, schema: pa.Schema, location: str) -> list[str]:
    """Return the columns of `schema` that a file has; log the defaults of those that it lacks.

    Raises:
        FormatError: a column that has no default is missing, or two columns have its name.
    """
    file_schema = file.schema_arrow
    names = []
    for column in schema:
        count = len(file_schema.get_all_field_indices(column.name))
        if count == 1:
            names.append(column.name)
        elif not count and column.name in OPTIONAL_COLUMNS:
            value = OPTIONAL_COLUMNS[column.name]
            warn_of_default(location.rsplit("/", 1)[-1], column.name, repr(value))
        else:
            file_columns = ", ".join(f"{f.name} {f.type}" for f in file_schema)
            raise FormatError(
                f"{location}: its columns are not those of format {FORMAT_VERSION}: "
                f"{'two named' if count else 'no'} {column.name} in {file_columns}"
            )
    return names


@functools.cache
def warn_of_default(file: str, name: str, value: str) -> None:
    """Log once per process that `name` is absent in files of this name."""
    log.warning("%s: has no %s; %s is used in its place", file, name, value)


def select_known_fields(names: Iterable[str], record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object that this version knows; ignore the others."""
    return {name: record[name] for name in names if name in record}


CARD_TYPES = {
    **dict.fromkeys(("samples", "shards", "rejects", "saliency_side"), int),
    **{"classes": list, "estimator": dict, "plan": str, "versions": dict},
}
"""Types of the fields of the card that are more than shown to the user."""


@dataclass(frozen=True)
class DatasetCard:
    """Content of `dataset.json`, which is written last: it marks the dataset as complete.

    A field with a default here may be absent in a file.

    Attributes:
        name, split: as given by the user.
        samples, shards, rejects: numbers of rows of the three tables.
        classes: names by label; empty when nothing is labeled.
        saliency_side: cells on a side of every stored map.
        estimator: its name, all its parameters, and the sha256 of its weights (None without any).
        plan: sha256 of the assignment of source images to shards.
        seed: random seed of the global shuffle.
        versions: versions of the packages that wrote the dataset.
    """

    name: str
    samples: int
    shards: int
    rejects: int
    classes: list[str]
    saliency_side: int
    split: str = ""
    estimator: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        first = {name: getattr(self, name) for name in ("format_version", "name", "split")}
        fields = {**first, **dataclasses.asdict(self)}
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, location: str) -> "DatasetCard":
        """Read a card; ignore fields that this version does not know.

        Raises:
            FormatError: the content is not JSON, has another format version, lacks a field that has
                no default, or has a field of another type.
        """
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{location}: not JSON ({error})") from error
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            advice = (
                "it was written by a newer version of this project; upgrade to read it"
                if isinstance(version, int) and version > FORMAT_VERSION
                else "it is not a card of this project"
            )
            raise FormatError(
                f"{location}: format version {version!r}, not {FORMAT_VERSION}: {advice}"
            )
        try:
            card = cls(
                **select_known_fields((entry.name for entry in dataclasses.fields(cls)), fields)
            )
        except TypeError as error:
            raise FormatError(f"{location}: {str(error).removeprefix('DatasetCard.')}") from error
        for entry in dataclasses.fields(cls):
            if entry.name not in fields:
                warn_of_default(CARD, entry.name, repr(getattr(card, entry.name)))
        for name, kind in CARD_TYPES.items():
            if type(value := getattr(card, name)) is not kind:
                raise FormatError(
                    f"{location}: its {name} is {value!r}, not of type {kind.__name__}"
                )
        if not all(isinstance(name, str) for name in card.classes):
            raise FormatError(f"{location}: its classes are not all text")
        return card
