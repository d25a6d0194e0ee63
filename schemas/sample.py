"""One sample and its members in a tar.

KEY.jpg | .png | .webp ...   the source file's own bytes, or the image encoded again
KEY.saliency.png             the saliency map, 8-bit grayscale (see `saliency.py`)
KEY.cls                      the label as ASCII digits, `-1` when the source has none

After them a sample may have further members, which this project carries along but does not read:
KEY.labels.json of a multi-label set, or other files that a source of shards had beside its images.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

SALIENCY_MEMBER = "saliency.png"
LABEL_MEMBER = "cls"
UNLABELED = -1

# The formats that DALI decodes directly: Pillow's name of the format, and the member's extension. A
# loader lists these extensions to its reader as alternatives of one component.
IMAGE_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG followed by further pictures; only the first is read
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tiff",
    "JPEG2000": "jp2",
    "PPM": "pnm",
}

OWN_MEMBERS = {*IMAGE_EXTENSIONS.values(), SALIENCY_MEMBER, LABEL_MEMBER}

# A USTAR header holds 100 bytes of name: KEY.EXTENSION.
MAX_KEY_LENGTH = 64
KEY_PATTERN = re.compile(r"[0-9A-Za-z_-]+")
MEMBER_PATTERN = re.compile(r"(?!\.)[0-9A-Za-z_.-]{1,35}")


@dataclass(frozen=True, eq=False)
class Sample:
    """An image, its saliency and its label: bytes and numpy only.

    Attributes:
        key: unique in the dataset; letters, digits, `_` and `-` only, at most 64 of them.
        image: the encoded file.
        extension: extension of the image member, one of the values of `IMAGE_EXTENSIONS`.
        saliency: (side, side) float32, the aggregation map over the whole (oriented) image; any
            affine scale. Read back from disk it is rounded to 255 steps between its own limits.
        label: class index, or -1 for none.
        height, width: pixels of the image after its EXIF orientation is applied.
        source: location of the original file, relative to the source's root; "" when unknown.
        reencoded: True if `image` is not the source file's own bytes.
        members: further files of the sample, by the member's extension.
    """

    key: str
    image: bytes = field(repr=False)
    extension: str
    saliency: np.ndarray = field(repr=False)
    label: int
    height: int
    width: int
    source: str = ""
    reencoded: bool = False
    members: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.extension not in IMAGE_EXTENSIONS.values():
            raise ValueError(f"sample {self.key}: unknown image extension {self.extension!r}")
        if not isinstance(self.label, int | np.integer) or isinstance(self.label, bool):
            raise ValueError(f"sample {self.key}: label {self.label!r} is not an integer")
        if self.label < UNLABELED:
            raise ValueError(f"sample {self.key}: label {self.label} is below {UNLABELED}")
        if not self.image:
            raise ValueError(f"sample {self.key}: the image has no bytes")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"sample {self.key}: {self.height} x {self.width} pixels")
        for extension in self.members:
            if extension in OWN_MEMBERS or not MEMBER_PATTERN.fullmatch(extension):
                raise ValueError(f"sample {self.key}: {extension!r} cannot be a member's name")


def check_key(key: str) -> None:
    """Raise ValueError unless `key` is a valid name of a sample."""
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"key {key!r} has other characters than letters, digits, '_' and '-'")
    if len(key) > MAX_KEY_LENGTH:
        raise ValueError(f"key {key!r} is longer than {MAX_KEY_LENGTH} characters")
