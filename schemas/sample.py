"""One sample and its three members in a tar.

KEY.jpg | .png | .webp ...   the source file's own bytes
KEY.saliency.png             the saliency map, 8-bit grayscale (see `saliency.py`)
KEY.cls                      the label as ASCII digits, `-1` when the source has none
"""

import re
from dataclasses import dataclass

import numpy as np

SALIENCY_MEMBER = "saliency.png"
LABEL_MEMBER = "cls"
UNLABELLED = -1

# The formats that DALI decodes as they are, by the name that Pillow gives them, and the member's
# extension. A loader lists these extensions to its reader as alternatives of one component.
IMAGE_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind the first: read as its first
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tiff",
    "JPEG2000": "jp2",
    "PPM": "pnm",
}

# A USTAR header holds 100 bytes of name, and the longest member name is KEY.saliency.png.
MAX_KEY_LENGTH = 100 - len(f".{SALIENCY_MEMBER}")
KEY_PATTERN = re.compile(r"[0-9A-Za-z_-]+")


@dataclass(frozen=True, eq=False)
class Sample:
    """An image, its saliency and its label: bytes and numpy only.

    Attributes:
        key: unique in the dataset; letters, digits, `_` and `-` only, at most 87 of them.
        image: the encoded file.
        extension: of the image member, one of `IMAGE_EXTENSIONS`' values.
        saliency: (side, side) float32, the aggregation map over the whole (oriented) image; any
            affine scale. Read back from disk it is rounded to 255 steps between its own limits.
        label: class index, or -1 for none.
        height, width: pixels of the image after its EXIF orientation is applied.
        source: where it came from, relative to the source's root; "" when unknown.
        reencoded: whether `image` is not the source file's own bytes.
    """

    key: str
    image: bytes
    extension: str
    saliency: np.ndarray
    label: int
    height: int
    width: int
    source: str = ""
    reencoded: bool = False

    def __post_init__(self) -> None:
        check_key(self.key)
        if self.extension not in IMAGE_EXTENSIONS.values():
            raise ValueError(f"sample {self.key}: unknown image extension {self.extension!r}")
        if self.label < UNLABELLED:
            raise ValueError(f"sample {self.key}: label {self.label} is below {UNLABELLED}")
        if not self.image:
            raise ValueError(f"sample {self.key}: the image has no bytes")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"sample {self.key}: {self.height} x {self.width} pixels")


def check_key(key: str) -> None:
    """Raises ValueError unless `key` may be the name of a sample."""
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"key {key!r} has other characters than letters, digits, '_' and '-'")
    if len(key) > MAX_KEY_LENGTH:
        raise ValueError(f"key {key!r} is longer than {MAX_KEY_LENGTH} characters")
