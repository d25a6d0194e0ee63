"""Test the CPU time of a worker: its work is real, only the pixels and the network are not."""

from pathlib import Path

from bench.precompute_cpu import measure_cpu
from precompute.sources import list_images
from precompute.sources.trees import Folder
from schemas.shard import read_marker
from schemas.storage import Store
from tests.conftest import encode, noise


def test_shards_are_built_over_the_photos_own_shapes(tmp_path: Path) -> None:
    for index in range(5):
        path = tmp_path / "root" / "a" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(index, 30 + index, 50)))
    source = Folder(str(tmp_path / "root"), "train", False)
    images = list_images(source.images())[0]
    found = measure_cpu(source, images, tmp_path / "out", repeats=2)
    assert len(found) == 2
    assert min(found) > 0
    rows = read_marker(Store(tmp_path / "out"), 2).samples.to_pylist()
    assert [(row["height"], row["width"]) for row in rows] == [(30 + n, 50) for n in range(5)]
    for row, image in zip(rows, images, strict=True):
        assert row["image_bytes"] == len(source.read(image))
