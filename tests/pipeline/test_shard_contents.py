"""Test that damage to the index or the table of a shard does not change what is read of it."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.shard_contents import COLUMNS, DamagedShardError, parse_shard_contents
from schemas import ShardDataset, write_dataset
from schemas.tables import shard_name
from tests.pipeline.conftest import picture, sample_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    samples = [sample_of(index, picture(index)) for index in range(6)]
    folder = tmp_path_factory.mktemp("contents") / "d"
    return write_dataset(folder, samples, name="t", classes=["a"] * 11, shard_samples=6)


def read_side_files(dataset: ShardDataset) -> tuple[bytes, bytes]:
    read = dataset.store.read
    return read(shard_name(0, "idx")), read(shard_name(0, "parquet"))


def flip_bits(content: bytes) -> Iterator[bytes]:
    """Yield copies of the content with one bit flipped, a different bit in each byte."""
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        yield bytes(damaged)


def test_values_are_those_of_the_samples(dataset: ShardDataset) -> None:
    contents = parse_shard_contents(dataset.shards[0], *read_side_files(dataset), "shards/000000")
    values = dict(zip(COLUMNS, contents.values, strict=True))
    tar = (Path(dataset.url) / shard_name(0, "tar")).read_bytes()
    for index, sample in enumerate(dataset):
        assert contents.keys[index] == sample.key
        assert values["label"][index] == sample.label
        assert (values["height"][index], values["width"][index]) == (sample.height, sample.width)
        start = values["image"][index]
        assert tar[start : start + values["image_size"][index]] == sample.image


def test_a_flipped_bit_is_noticed_or_harmless(dataset: ShardDataset) -> None:
    """Only the size of a map may differ: then its PNG is incomplete, or has bytes after its end."""
    row, (index, parquet) = dataset.shards[0], read_side_files(dataset)
    original = parse_shard_contents(row, index, parquet, "")
    files = [(damaged, parquet) for damaged in flip_bits(index)]
    files += [(index, damaged) for damaged in flip_bits(parquet)]
    noticed = 0
    for damaged_index, damaged_parquet in files:
        try:
            contents = parse_shard_contents(row, damaged_index, damaged_parquet, "")
        except DamagedShardError:
            noticed += 1
            continue
        assert contents.keys == original.keys
        np.testing.assert_array_equal(contents.values[:-1], original.values[:-1])
    assert noticed > len(files) / 3  # all others are in columns that a loader does not read


def test_damage_to_a_table_without_checksums_raises_no_other_error(dataset: ShardDataset) -> None:
    """Tables of earlier versions have none, so damage may go unnoticed there."""
    index, parquet = read_side_files(dataset)
    table = pq.read_table(pa.BufferReader(parquet))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    noticed = 0
    for damaged in flip_bits(buffer.getvalue()):
        try:
            parse_shard_contents(dataset.shards[0], index, damaged, "")
        except DamagedShardError:
            noticed += 1
    assert noticed
