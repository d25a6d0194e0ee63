"""One shard: a tar, its DALI index, and the parquet file that marks it as written.

They are written in this order, each atomically, so a shard counts as written exactly when its
parquet file exists. Tars are plain USTAR with fixed times and owners: DALI reads no PAX headers,
and equal samples give equal bytes.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from schemas.errors import FormatError
from schemas.names import to_stored
from schemas.parallel import map_ahead
from schemas.saliency import SaliencyMap
from schemas.sample import LABEL_MEMBER, SALIENCY_MEMBER, Sample
from schemas.storage import Store
from schemas.tables import (
    SAMPLES_SCHEMA,
    Reject,
    ShardRow,
    build_stored_reject,
    from_parquet,
    select_known_fields,
    shard_name,
    to_parquet,
)
from schemas.ustar import BLOCK, UstarWriter, compute_member_size

INDEX_VERSION = "v1.2"
MARKER_METADATA = b"saliency_shards"
MARKERS_AT_A_TIME = 16
"""Number of markers read in parallel: enough to hide the latency of an object store."""


class Member(NamedTuple):
    """One file in a tar: `KEY.extension`, its content at `offset` for `size` bytes."""

    key: str
    extension: str
    offset: int
    size: int


@dataclass(frozen=True)
class ShardMarker:
    """Content of a shard's parquet file.

    Attributes:
        row: the shard's row of shards.parquet.
        samples: the shard's rows of samples.parquet.
        rejects: the shard's rows of rejects.parquet.
        settings: the settings of the job that wrote the shard; a job with other settings must not
            add to the dataset.
    """

    row: ShardRow
    samples: pa.Table
    rejects: list[Reject]
    settings: dict[str, Any]


def write_shard(
    store: Store,
    shard: int,
    samples: Iterable[Sample],
    rejects: Iterable[Reject] = (),
    settings: dict[str, Any] | None = None,
) -> ShardMarker:
    """Write one shard: tar, then index, then marker. The tar is held in memory until it is written.

    Raises:
        ValueError: two samples have the same key, or a map is not square and finite.
        UserError: no space left, or no permission.
    """
    tar, rows, members = pack(shard, samples)
    row = ShardRow(shard, len(rows), len(tar), hashlib.sha256(tar).hexdigest())
    table = pa.Table.from_pylist(rows, schema=SAMPLES_SCHEMA)
    stored = [build_stored_reject(reject) for reject in rejects]
    marker = ShardMarker(row, table, stored, settings or {})
    store.write(shard_name(shard, "tar"), tar)
    store.write(shard_name(shard, "idx"), index_members(members))
    store.write(shard_name(shard, "parquet"), marker_to_parquet(marker))
    return marker


def pack(shard: int, samples: Iterable[Sample]) -> tuple[bytes, list[dict[str, Any]], list[Member]]:
    """Return the tar of these samples, their rows of samples.parquet, and the tar's members."""
    tar = UstarWriter()
    rows: list[dict[str, Any]] = []
    packed: list[Member] = []
    keys: set[str] = set()
    for index, sample in enumerate(samples):
        if sample.key in keys:
            raise ValueError(f"key {sample.key} twice in shard {shard}")
        keys.add(sample.key)
        saliency = SaliencyMap.quantize(sample.saliency)
        members = {
            sample.extension: sample.image,
            SALIENCY_MEMBER: saliency.to_png(),
            LABEL_MEMBER: str(sample.label).encode("ascii"),
            **dict(sorted(sample.members.items())),
        }
        for extension, content in members.items():
            offset = tar.add(f"{sample.key}.{extension}", content)
            packed.append(Member(sample.key, extension, offset, len(content)))
        rows.append(
            {
                "key": sample.key,
                "shard": shard,
                "index": index,
                "label": sample.label,
                "height": sample.height,
                "width": sample.width,
                "image_bytes": len(sample.image),
                "image_sha256": hashlib.sha256(sample.image).hexdigest(),
                "saliency_min": saliency.minimum,
                "saliency_max": saliency.maximum,
                "foreground": saliency.foreground(),
                "source": to_stored(sample.source),
                "reencoded": sample.reencoded,
            }
        )
    return tar.getvalue(), rows, packed


def list_members(tar: bytes) -> Iterator[Member]:
    """Yield the files of a tar in order.

    tarfile takes a damaged header for the end of the archive; here it is an error.

    Raises:
        FormatError: a header is damaged, or the tar ends too early.
    """
    position, last = 0, "the start"
    while True:
        block = tar[position : position + BLOCK]
        if len(block) < BLOCK:
            raise FormatError(f"cut short after {last}, at byte {len(tar)}")
        if block == bytes(BLOCK):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise FormatError(f"damaged header at byte {position}, after {last}") from error
        if info.size < 0:
            raise FormatError(f"damaged header at byte {position}, after {last}")
        if info.type != tarfile.REGTYPE:
            raise FormatError(f"{info.name} at byte {position} is not a plain file")
        if position + BLOCK + info.size > len(tar):
            raise FormatError(f"cut short inside {info.name}, at byte {len(tar)}")
        key, _, extension = info.name.partition(".")
        yield Member(key, extension, position + BLOCK, info.size)
        last = info.name
        position += compute_member_size(info.size)


def build_index(tar: bytes) -> bytes:
    """Return the DALI index of a tar. Raises FormatError where the tar is damaged."""
    return index_members(list_members(tar))


def index_members(members: Iterable[Member]) -> bytes:
    """Return the DALI index: one line per sample, `extension offset size name` for each member."""
    lines: dict[str, list[str]] = {}
    for key, extension, offset, size in members:
        lines.setdefault(key, []).append(f"{extension} {offset} {size} {key}.{extension}")
    text = [f"{INDEX_VERSION} {len(lines)}", *(" ".join(line) for line in lines.values())]
    return ("\n".join(text) + "\n").encode("ascii")


def marker_to_parquet(marker: ShardMarker) -> bytes:
    record = {
        "shard": marker.row._asdict(),
        "rejects": [reject._asdict() for reject in marker.rejects],
        "settings": marker.settings,
    }
    metadata = {MARKER_METADATA: json.dumps(record, sort_keys=True).encode()}
    return to_parquet(marker.samples.replace_schema_metadata(metadata))


def read_markers(store: Store, shards: Iterable[int]) -> Iterator[ShardMarker]:
    """Read the parquet files of many shards, several in parallel, and yield them in order.

    Raises:
        FileNotFoundError, FormatError: see `read_marker`.
    """
    return map_ahead(lambda shard: read_marker(store, shard), shards, MARKERS_AT_A_TIME)


def read_marker(store: Store, shard: int) -> ShardMarker:
    """Read a shard's parquet file back.

    Raises:
        FileNotFoundError: the shard is not written.
        UserError: the file cannot be read.
        FormatError: the file is damaged, or it is not the parquet file of a shard.
    """
    name = shard_name(shard, "parquet")
    location = store.location(name)
    with store.translate_read_errors(name):
        content = store.read(name)
    table = from_parquet(content, SAMPLES_SCHEMA, location)
    metadata = (table.schema.metadata or {}).get(MARKER_METADATA)
    if metadata is None:
        raise FormatError(f"{location}: not a shard's parquet file: its metadata is missing")
    try:
        record = json.loads(metadata)
        return ShardMarker(
            row=ShardRow(**select_known_fields(ShardRow._fields, record["shard"])),
            samples=table.replace_schema_metadata(None),
            rejects=[Reject(**select_known_fields(Reject._fields, r)) for r in record["rejects"]],
            settings=record["settings"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{location}: not a shard's marker: its metadata is damaged "
            f"({type(error).__name__}: {error})"
        ) from error
