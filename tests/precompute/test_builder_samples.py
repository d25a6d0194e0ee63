"""Tests of the samples and rejects that a builder makes of single images."""

import errno
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage
from schemas import UserError
from schemas.shard import read_marker
from schemas.storage import Store
from schemas.tables import Reject
from tests.conftest import encode, noise
from tests.precompute.test_shard_builder import IMAGES, Flat, InMemory, build


def test_each_sample_has_what_belongs_to_its_own_image(tmp_path: Path) -> None:
    """The sizes, formats, labels and members of ten images, in batches of four, all differ."""
    pixels = [noise(index, 20 + index, 60 - index) for index in range(10)]
    files = [encode(p, "GIF" if index == 5 else "JPEG") for index, p in enumerate(pixels)]
    images = [SourceImage(f"k{i}", f"folder/{i}", i % 3) for i in range(10)]

    class Members(InMemory):
        def read(self, image: SourceImage) -> bytes:
            return files[int(image.key[1:])]

        def members(self, image: SourceImage) -> dict[str, bytes]:
            return {"txt": image.key.encode()}

    class Height(Flat):
        def __call__(self, batch: Any) -> np.ndarray:
            return np.stack([np.eye(2, dtype=np.float32) * image.shape[0] for image in batch])

    builder = ShardBuilder(Members(), Height(), Store(tmp_path), 4, Resize(), settings={})
    rows = builder.build(0, images).samples.to_pylist()
    assert [(r["key"], r["source"], r["label"], r["reencoded"]) for r in rows] == [
        (f"k{i}", f"folder/{i}", i % 3, i == 5) for i in range(10)
    ]
    shapes = [(20 + i, 60 - i) for i in range(10)]
    assert [(r["height"], r["width"]) for r in rows] == shapes
    assert [r["saliency_max"] for r in rows] == [height for height, _ in shapes]
    with tarfile.open(tmp_path / "shards" / "000000.tar") as archive:
        written = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    for i in range(10):
        assert written[f"k{i}.txt"] == f"k{i}".encode()
        assert i == 5 or written[f"k{i}.jpg"] == files[i]


def failing(method: str, error: Exception) -> Source:
    """Return a source of which one method fails on one image."""

    def fail(self: Source, image: SourceImage) -> Any:
        if image is IMAGES[5]:
            raise error
        return getattr(InMemory, method)(self, image)

    return type("Failing", (InMemory,), {method: fail})()


@pytest.mark.parametrize("method", ["read", "members"])
@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),  # a store gives no error number
        *[OSError(number, "no") for number in (errno.EACCES, errno.ENAMETOOLONG)],
        ValueError("damaged"),
    ],
)
def test_an_error_of_one_file_rejects_its_image(
    tmp_path: Path, method: str, error: Exception
) -> None:
    build(tmp_path, failing(method, error))
    reason, detail = "unreadable", f"{type(error).__name__}: {error}"
    if method == "members" and not isinstance(error, OSError):
        reason, detail = "bad-annotation", str(error)
    assert read_marker(Store(tmp_path), 0).rejects == [Reject("5.jpg", reason, detail)]


@pytest.mark.parametrize("method", ["read", "members"])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "too many open files"),
        OSError("no answer"),
        UserError("expired"),
        MemoryError("all used"),
    ],
)
def test_an_error_that_the_next_image_would_have_too_rejects_none(
    tmp_path: Path, method: str, error: Exception
) -> None:
    wanted = MemoryError if isinstance(error, MemoryError) else UserError
    with pytest.raises(wanted, match=re.escape(str(error))):
        build(tmp_path, failing(method, error))
    assert not list(tmp_path.rglob("*.*"))


def test_an_image_that_killed_a_worker_is_not_read(tmp_path: Path) -> None:
    builder = ShardBuilder(
        failing("read", OSError("read again")), Flat(), Store(tmp_path), 4, Resize(), {}
    )
    marker = builder.build(0, IMAGES, refused={IMAGES[5].key: "signal 11"})
    assert marker.rejects == [Reject("5.jpg", "kills-worker", "signal 11")]
