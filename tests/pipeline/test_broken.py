"""Shards that break before or during reading cause one line that names shard and sample."""

import dataclasses
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import Cache, EvalViews, MaskedViews
from schemas import Sample, ShardDataset, UserError, write_dataset
from schemas.tables import CARD, SHARDS, SHARDS_SCHEMA, build_table, to_parquet
from tests.pipeline.conftest import count_threads_left_by, picture, sample_of, small

MANY = 1600
"""Number of samples, in shards of 20, so that most shards are unopened after the first batch."""


def views_of(dataset: ShardDataset) -> MaskedViews:
    return MaskedViews(dataset.url, small("mean"), 8, "cpu")


def refused(dataset: ShardDataset) -> str:
    """Return the one-line error that iterating ends with."""
    with pytest.raises(UserError) as refusal:
        list(views_of(dataset))
    assert "\n" not in str(refusal.value)
    assert f"saliency-shards verify {dataset.url}" in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_limit_of_open_files_does_not_blame_a_shard(
    own_dataset: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    cache = Cache(tmp_path / "cache", 10**9) if is_cached else None
    views = MaskedViews(own_dataset.url, small("mean"), 3, "cpu", cache=cache)
    open_file = os.open

    def open_few(path: str | Path, *arguments: int) -> int:
        if str(path).endswith(".tar"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return open_file(path, *arguments)

    monkeypatch.setattr(os, "open", open_few)
    with pytest.raises(
        UserError, match=r"shard \d: too many open files; raise .*ulimit"
    ) as refusal:
        next(iter(views))
    assert "verify" not in str(refusal.value)


@pytest.mark.parametrize("kind", [MaskedViews, EvalViews])
def test_dalis_threads_end_with_an_error(own_dataset: ShardDataset, kind: type) -> None:
    Path(own_dataset.shard_urls[1]).unlink()
    views = kind(own_dataset.url, recipe=small("mean"), batch_size=2, device="cpu")

    def read_all() -> None:
        with pytest.raises(UserError, match="is missing"):
            list(views)

    assert count_threads_left_by(read_all) == 0


def jpeg_cut_short() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize("content", [jpeg_cut_short(), b"\xff\xd8\xff\xe0no picture" * 30, b"no"])
def test_an_image_that_does_not_decode(tmp_path: Path, content: bytes) -> None:
    samples = [sample_of(index, picture(index)) for index in range(24)]
    good = samples[13]
    samples[13] = Sample(
        good.key, content, "jpg", good.saliency, good.label, good.height, good.width
    )
    dataset = write_dataset(tmp_path / "d", samples, name="t", classes=["a"] * 11, shard_samples=8)
    assert refused(dataset).startswith(f"{dataset.shard_urls[1]}: sample key-013: ")
    with pytest.raises(UserError, match="sample key-013"):
        list(EvalViews(dataset.url, 8, "cpu", crop_size=56))


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    image = io.BytesIO()
    Image.fromarray(picture(0)[:16, :16]).save(image, "PNG")
    saliency = np.zeros((28, 28), np.float32)
    return [
        Sample(f"k{index:05d}", image.getvalue(), "png", saliency, 0, 16, 16)
        for index in range(MANY)
    ]


def unlink(tar: Path) -> None:
    tar.unlink()


def cut(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


@pytest.mark.parametrize("damage", [unlink, cut])
def test_a_shard_that_breaks_while_training(
    tmp_path: Path, many: list[Sample], damage: Callable[[Path], None]
) -> None:
    dataset = write_dataset(tmp_path / "d", many, name="t", classes=["a"], shard_samples=20)
    steps = iter(views_of(dataset))
    next(steps)
    for url in dataset.shard_urls:
        damage(Path(url))
    with pytest.raises(
        UserError, match=rf"{tmp_path}/d/shards/0000\d\d.tar: shard \d+: .*saliency-shards verify"
    ):
        list(steps)


def overwritten(tar: Path) -> None:
    """Overwrite an open file with other bytes of the same length."""
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.write(bytes(size))


def spoil_padding(tar: Path) -> None:
    """Change a byte behind the last sample, so that all headers stay and everything decodes."""
    with tar.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    touch(tar)


def touch(tar: Path) -> None:
    """Change the time alone, to one that even a coarse clock of a file system tells apart."""
    os.utime(tar, ns=(0, 1))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, r"sample k\d+ .*cut short"),
        (overwritten, r"sample k\d+ .*any more"),
        (spoil_padding, "it has changed since it was opened"),
    ],
)
def test_an_open_shard_that_changes_is_named(
    tmp_path: Path, many: list[Sample], damage: Callable[[Path], None], reason: str
) -> None:
    dataset = write_dataset(tmp_path / "d", many[:100], name="t", classes=["a"])
    steps = iter(views_of(dataset))
    next(steps)
    damage(Path(dataset.shard_urls[0]))
    with pytest.raises(UserError, match=rf"000000.tar: shard 0: {reason}"):
        list(steps)


@pytest.mark.parametrize("change", [unlink, touch])
def test_an_open_shard_stays_readable(
    tmp_path: Path, many: list[Sample], change: Callable[[Path], None]
) -> None:
    dataset = write_dataset(tmp_path / "d", many[:100], name="t", classes=["a"])
    steps = iter(views_of(dataset))
    next(steps)
    change(Path(dataset.shard_urls[0]))
    assert len(list(steps)) == 100 // 8 - 1


def test_a_sample_without_its_saliency(own_dataset: ShardDataset) -> None:
    index = Path(own_dataset.index_urls[1])
    lines = index.read_text().split("\n")
    words = lines[2].split()
    place = words.index("saliency.png")
    lines[2] = " ".join(words[:place] + words[place + 4 :])
    index.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"shards/000001.idx: shard 1: line 3 ") as refusal:
        list(MaskedViews(own_dataset.url, small("mean"), 2, "cpu"))
    assert "\n" not in str(refusal.value)


def test_another_format_version_is_refused(own_dataset: ShardDataset) -> None:
    card = Path(own_dataset.url) / "dataset.json"
    card.write_text(card.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match="format version 2"):
        MaskedViews(own_dataset.url, small("mean"), 2, "cpu")


def test_a_dataset_without_samples_is_refused(own_dataset: ShardDataset) -> None:
    store, table = own_dataset.store, [row._replace(samples=0) for row in own_dataset.shards]
    store.write(SHARDS, to_parquet(build_table(table, SHARDS_SCHEMA)))
    store.write(CARD, dataclasses.replace(own_dataset.card, samples=0).to_json())
    with pytest.raises(UserError, match="0 samples are too few for batch 8"):
        views_of(own_dataset)
