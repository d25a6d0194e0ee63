"""Parse the index and the table of a shard: keys, labels, sizes and byte offsets of its samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa

from schemas import FormatError, ShardRow, UserError
from schemas.sample import SALIENCY_MEMBER
from schemas.shard import BLOCK, INDEX_VERSION
from schemas.tables import SAMPLES_SCHEMA, from_parquet

SCHEMA = pa.schema(
    SAMPLES_SCHEMA.field(name) for name in ("key", "label", "height", "width", "image_bytes")
)
"""Columns of the shard's parquet file that a loader needs."""

COLUMNS = ("label", "height", "width", "image", "image_size", "saliency", "saliency_size")
"""Rows of `ShardContents.values`: parquet columns, then offset and size of image and map."""

WORDS = 8
"""Words of a line of the index about image and map: extension, offset, size and name of each."""

NUMBERS = (1, 2, 5, 6)
"""Positions of offsets and sizes among these words."""


class DamagedShardError(UserError):
    """Files of a shard are missing or contradict each other or the tables of the dataset."""


@dataclass(frozen=True)
class ShardContents:
    """The samples of a shard.

    Attributes:
        keys: their keys.
        values: (len(COLUMNS), samples) int64.
    """

    keys: list[str]
    values: np.ndarray


def parse_shard_contents(
    row: ShardRow, index: bytes, parquet: bytes, location: str
) -> ShardContents:
    """Parse the index and the parquet file of a shard.

    Args:
        location: location of the shard's files without an extension, for messages.

    Raises:
        DamagedShardError: they contradict each other or `row`.
    """
    try:
        samples = from_parquet(parquet, SCHEMA, f"{location}.parquet")
        keys: list[str] = samples["key"].to_pylist()
    except (FormatError, UnicodeDecodeError) as error:
        raise DamagedShardError(f"shard {row.shard}: {error}") from error

    def fail(reason: str) -> NoReturn:
        raise build_damage_error(row, location, "idx", reason)

    head, *lines = index.decode("ascii", "replace").splitlines() or [""]
    if head != f"{INDEX_VERSION} {row.samples}":
        fail(f"line 1 is {head!r}, not '{INDEX_VERSION} {row.samples}'")
    if not len(lines) == len(keys) == row.samples:
        fail(
            f"{len(lines)} samples are listed, {len(keys)} in the parquet file and {row.samples} "
            "in the table"
        )
    words = [line.split(maxsplit=WORDS)[:WORDS] for line in lines]
    if (bad := find_foreign_line(words, keys)) is not None:
        fail(f"line {bad + 2} does not list image and map of {keys[bad]}")
    try:
        extents = parse_extents(words)
    except (ValueError, OverflowError):
        bad = next(n for n, line in enumerate(words) if not has_numbers(line))
        fail(f"line {bad + 2} lacks a number for an offset or a size")
    image, image_size, saliency, saliency_size = extents
    if (
        (image < BLOCK)
        | (saliency < image + image_size)
        | (saliency + saliency_size > row.bytes)
        | (image % BLOCK != 0)
        | (saliency % BLOCK != 0)
    ).any():
        fail(f"a member lies outside the tar's {row.bytes} bytes, or not at a block's start")
    wrong = np.flatnonzero(image_size != samples["image_bytes"].to_numpy())
    if len(wrong):
        fail(f"the parquet file has another size for the image of {keys[wrong[0]]}")
    columns = [samples[name].to_numpy().astype(np.int64) for name in COLUMNS[:-4]]
    return ShardContents(keys, np.stack([*columns, *extents]))


def find_foreign_line(words: Sequence[list[str]], keys: Sequence[str]) -> int | None:
    """Return the first line that does not name image and map of its key, or None."""
    for number, (line, key) in enumerate(zip(words, keys, strict=True)):
        if (
            len(line) < WORDS
            or line[3] != f"{key}.{line[0]}"
            or line[7] != f"{key}.{SALIENCY_MEMBER}"
        ):
            return number
    return None


def parse_extents(words: Sequence[list[str]]) -> np.ndarray:
    """Return offset and size of each image and of each map: (4, samples) int64.

    Raises:
        ValueError, OverflowError: a line lacks one of these numbers (`has_numbers`).
    """
    extents = np.empty((len(NUMBERS), len(words)), np.int64)
    for column, word in enumerate(NUMBERS):
        extents[column] = [int(line[word]) for line in words]
    return extents


def has_numbers(line: list[str]) -> bool:
    """Return whether offsets and sizes are numbers (of at most 18 digits, which fit an int64)."""
    return all(line[word].isdigit() and len(line[word]) <= 18 for word in NUMBERS)


def build_damage_error(
    row: ShardRow, location: str, extension: str, reason: str
) -> DamagedShardError:
    """Return an error about one of a shard's files."""
    return DamagedShardError(f"{location}.{extension}: shard {row.shard}: {reason}")
