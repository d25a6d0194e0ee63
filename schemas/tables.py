"""The tables beside the shards, and the card that says the dataset is whole."""

import dataclasses
import functools
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import FormatError
from schemas.names import to_bytes, to_stored

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
        ("index", pa.int32()),  # place within its shard, from 0
        ("label", pa.int32()),  # -1: none
        ("height", pa.int32()),  # pixels, EXIF orientation applied
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
        ("bytes", pa.int64()),  # of the tar
        ("sha256", pa.string()),  # of the tar
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("source", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)
MERGED_SAMPLES = 10**8
"""A dataset of more samples has no samples.parquet (it would have 8 GB): the shards' own tables
hold its rows (ours)."""
OPTIONAL_COLUMNS: dict[str, Any] = {
    "foreground": None,  # it follows from the map
    "source": "",
    "reencoded": False,
    "detail": "",
}
"""Columns that a reader can do without, and what stands in their place."""


class ShardRow(NamedTuple):
    """One row of shards.parquet."""

    shard: int
    samples: int
    bytes: int
    sha256: str


class Reject(NamedTuple):
    """One row of rejects.parquet: an input that was not written.

    `reason` is a short fixed word to count by, `detail` a line for a person.
    """

    source: str
    reason: str
    detail: str = ""


def stored_reject(reject: Reject) -> Reject:
    """Return the reject as the table holds it: in UTF-8, its detail in one line."""
    detail = " ".join(to_bytes(reject.detail).decode("utf-8", "backslashreplace").split())
    return Reject(to_stored(reject.source), reject.reason, detail)


def shard_name(shard: int, suffix: str) -> str:
    """The name of a shard's file: `shard_name(3, "tar")` is `shards/000003.tar`."""
    return f"{SHARD_FOLDER}/{shard:06d}.{suffix}"


def table_of(rows: list[ShardRow] | list[Reject], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=schema)


def to_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def from_parquet(content: bytes, schema: pa.Schema, location: str) -> pa.Table:
    """Read the columns of `schema`, in its order, from the content of a parquet file.

    Raises:
        FormatError: see `read_columns`.
    """
    return read_columns(open_parquet(pa.BufferReader(content), location), schema, location)


def open_parquet(source: Any, location: str) -> pq.ParquetFile:
    """Read the footer of a parquet file. Raises FormatError when it is none.

    Args:
        source: a `pyarrow.BufferReader` or a `RangeReader`.
        location: name of the file, for messages.
    """
    try:
        # Without pre_buffer: Arrow would read a Python file in a thread of its own, which aborts
        # the process (apache/arrow#34314) when it lets go of the file while Python exits.
        return pq.ParquetFile(source, pre_buffer=False)
    except pa.ArrowException as error:
        raise FormatError(f"{location}: not a readable parquet file ({error})") from error


def read_columns(
    file: pq.ParquetFile, schema: pa.Schema, location: str, row_group: int | None = None
) -> pa.Table:
    """Read the columns of `schema`, in its order, of a row group or of the whole file.

    Columns that this version does not know are not read. An absent one of OPTIONAL_COLUMNS has its
    default, which is logged. Types of other widths are converted where no value changes.

    Raises:
        FormatError: the file is damaged, a column is missing or of another kind.
    """
    names = columns_there(file, schema, location)
    groups = range(file.num_row_groups) if row_group is None else [row_group]
    try:
        table = file.read_row_groups(groups, columns=names, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{location}: not a readable parquet file ({error})") from error
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    columns = []
    for wanted in schema:
        if wanted.name not in names:
            value = OPTIONAL_COLUMNS[wanted.name]
            columns.append(pa.array([value] * rows, wanted.type))
            continue
        try:
            columns.append(table.column(wanted.name).cast(wanted.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise FormatError(
                f"{location}: its column {wanted.name} is not {wanted.type} ({error})"
            ) from error
    return pa.Table.from_arrays(columns, schema=schema.with_metadata(file.schema_arrow.metadata))


def columns_there(file: pq.ParquetFile, schema: pa.Schema, location: str) -> list[str]:
    """Return which columns of `schema` a file has; log the defaults of those that it lacks.

    Raises:
        FormatError: a column that has no default is missing, or there are two of its name.
    """
    there = file.schema_arrow
    names = []
    for wanted in schema:
        count = len(there.get_all_field_indices(wanted.name))
        if count == 1:
            names.append(wanted.name)
        elif not count and wanted.name in OPTIONAL_COLUMNS:
            value = OPTIONAL_COLUMNS[wanted.name]
            tell_default(location.rsplit("/", 1)[-1], wanted.name, repr(value))
        else:
            found = ", ".join(f"{f.name} {f.type}" for f in there)
            raise FormatError(
                f"{location}: its columns are not those of format {FORMAT_VERSION}: "
                f"{'two named' if count else 'no'} {wanted.name} in {found}"
            )
    return names


@functools.cache
def tell_default(file: str, name: str, value: str) -> None:
    """Log that `name` is absent in files of this name; once in a process."""
    log.warning("%s: has no %s; %s stands in its place", file, name, value)


def known_fields(names: Iterable[str], record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object that this version knows; the others are ignored."""
    return {name: record[name] for name in names if name in record}


@dataclass(frozen=True)
class DatasetCard:
    """`dataset.json`, written last: its presence means that the dataset is whole.

    A field with a default here may be absent in a file.

    Attributes:
        name, split: as the user called them.
        samples, shards, rejects: rows of the three tables.
        classes: names by label; empty when nothing is labelled.
        saliency_side: cells on a side of every stored map.
        estimator: its name, all its parameters, and the sha256 of its weights (None without any).
        plan: sha256 of which source image belongs to which shard.
        seed: of the global shuffle.
        versions: of the packages that wrote it.
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
        """Read a card; fields that this version does not know are ignored.

        Raises:
            FormatError: no JSON, another format version, or a field without a default is missing.
        """
        try:
            fields = json.loads(content)
        except ValueError as error:
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
            card = cls(**known_fields((known.name for known in dataclasses.fields(cls)), fields))
        except TypeError as error:
            raise FormatError(f"{location}: {str(error).removeprefix('DatasetCard.')}") from error
        for known in dataclasses.fields(cls):
            if known.name not in fields:
                tell_default(CARD, known.name, repr(getattr(card, known.name)))
        return card
