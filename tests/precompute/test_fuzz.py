"""Fuzz tests: each mutated image is written or rejected, and all written ones can be trained on.

Every input is a function of its number, so `mutated(N)` reproduces the input named by a failure.
"""

import io
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import MaskedViews
from pipeline.recipes import get_recipe
from precompute.estimators import SpectralOptions
from precompute.job import Job
from precompute.plan import make_plan
from precompute.sources import Source, SourceImage, list_images
from tests.conftest import noise
from tests.precompute.conftest import without_ray

COUNT = 2000
FORMATS = {
    "jpeg": ("JPEG", {"quality": 90}),
    "progressive jpeg": ("JPEG", {"progressive": True}),
    "jpeg with exif": ("JPEG", {}),
    "png": ("PNG", {}),
    "palette png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "lossless webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "lzw tiff": ("TIFF", {"compression": "tiff_lzw"}),
}


@cache
def sound(name: str) -> bytes:
    picture = Image.fromarray(noise(3, 40, 48))
    if name == "palette png":
        picture = picture.convert("P")
    image_format, options = FORMATS[name]
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if "exif" in name or name == "lossless webp" else {}
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options, **more)
    return buffer.getvalue()


def mutated(number: int) -> bytes:
    """Return a valid image with flipped bits, a cut, or a swapped, duplicated or zeroed segment."""
    random = np.random.default_rng(number)
    name = list(FORMATS)[number % len(FORMATS)]
    content = bytearray(sound(name))
    end = min(len(content), 200) if random.random() < 0.5 else len(content)  # half: header only
    kind = number // len(FORMATS) % 5
    first, second = sorted(random.integers(1, end - 16, 2).tolist())
    length = int(random.integers(1, 16))
    if kind == 0:
        for _ in range(int(random.integers(1, 9))):
            content[int(random.integers(0, end))] ^= 1 << int(random.integers(0, 8))
    elif kind == 1:
        del content[int(random.integers(1, len(content))) :]
    elif kind == 2:
        parts = bytes(content[first : first + length]), bytes(content[second : second + length])
        content[second : second + length], content[first : first + length] = parts
    elif kind == 3:
        content[first:first] = content[second : second + length]
    else:
        content[first : first + length] = bytes(length)
    if name.endswith("png") and random.random() < 0.5:
        content = with_checksums(bytes(content))
    return bytes(content)


def with_checksums(png: bytes) -> bytearray:
    """Return the PNG with corrected checksums of its chunks, so that they do not reveal damage."""
    fixed, position = bytearray(png), 8
    while position + 12 <= len(png):
        length = int.from_bytes(png[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(png):
            break
        fixed[end : end + 4] = zlib.crc32(png[position + 4 : end]).to_bytes(4)
        position = end + 4
    return fixed


class Mutated(Source):
    """Source of mutated images, located by their numbers."""

    def __init__(self, count: int):
        self.count = count

    def images(self) -> Iterator[SourceImage]:
        for number in range(self.count):
            yield SourceImage(f"{number:05d}", str(number), -1)

    def read(self, image: SourceImage) -> bytes:
        return mutated(int(image.location))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, about damaged tags
def test_mutated_images_are_written_or_rejected_and_what_is_written_trains(tmp_path: Path) -> None:
    source = Mutated(COUNT)
    images, _ = list_images(source.images())
    plan = make_plan(images, seed=0, shard_samples=500)
    job = Job("fuzz", "train", source, plan, [], SpectralOptions(), 0, str(tmp_path / "out"), 32)
    dataset = without_ray(job)
    written = dataset.samples["source"].to_pylist()
    rejected = dataset.rejects["source"].to_pylist()
    assert sorted(map(int, written + rejected)) == list(range(COUNT))
    reasons = Counter(dataset.rejects["reason"].to_pylist())
    assert reasons.keys() <= {"undecodable", "not-an-image", "too-large"}, reasons
    assert min(len(written), len(rejected)) > COUNT / 10  # both outcomes are common

    recipe = replace(get_recipe("none"), crop_size=56)
    views = MaskedViews(str(tmp_path / "out"), recipe, batch_size=8, device="cpu", report=["keys"])
    seen = {key for batch in views for key in batch.sample_keys}
    assert len(seen) == len(written) // 8 * 8
