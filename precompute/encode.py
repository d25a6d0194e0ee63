"""Headers and re-encoding: what of an input's bytes is written."""

import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from precompute.sources import SourceImage
from schemas.errors import UserError
from schemas.sample import IMAGE_EXTENSIONS
from schemas.tables import Reject

EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


@dataclass(frozen=True)
class Resize:
    """Make larger images smaller before they are written; smaller ones stay as they are.

    Attributes:
        short_side: pixels of the shorter side, the aspect ratio kept (256 is what evaluation
            protocols on ImageNet resize to). None: every image keeps its own bytes.
        quality: of the JPEG that is written, 1 .. 95 (ours).
    """

    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"--resize is {self.short_side}; at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise UserError(f"--resize-quality is {self.quality}; it goes from 1 to 95")


@dataclass(frozen=True)
class EncodedImage:
    """An input that looks like an image; its pixels are not read yet.

    `pixels` is how many its header claims, `members` what is kept beside it.
    """

    image: SourceImage
    content: bytes
    extension: str
    reencoded: bool
    pixels: int
    members: dict[str, bytes]


class RejectedError(Exception):
    """This input cannot be written. Carries the row for rejects.parquet."""

    def __init__(self, image: SourceImage, reason: str, detail: str):
        super().__init__(detail)
        self.reject = Reject(image.location, reason, detail)


def check(
    image: SourceImage, content: bytes, members: dict[str, bytes], resize: Resize
) -> EncodedImage:
    """Look at the header: the format by its content, not by the file's name.

    Formats that DALI does not read are decoded by Pillow and re-encoded as PNG, without loss, their
    first frame, oriented. What is larger than `resize` asks for becomes a JPEG.

    Raises:
        RejectedError: empty, not an image, too many pixels, or not decodable.
    """
    if not content:
        raise RejectedError(image, "empty", "the file has no bytes; replace or remove it")
    try:
        with warnings.catch_warnings():
            # Pillow warns at 89 million pixels and refuses at twice that: the latter is our limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            header = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        detail = "no image format that is known; replace or remove it"
        raise RejectedError(image, "not-an-image", detail) from error
    except Image.DecompressionBombError as error:
        raise RejectedError(image, "too-large", str(error)) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedError(image, "undecodable", f"its header is damaged: {error}") from error
    pixels = header.width * header.height
    extension = IMAGE_EXTENSIONS.get(header.format or "")
    if resize.short_side is not None and min(header.size) > resize.short_side:
        smaller = shrink(image, header, resize.short_side, resize.quality)
        return EncodedImage(image, smaller, "jpg", True, pixels, members)
    if extension:
        return EncodedImage(image, content, extension, False, pixels, members)
    return EncodedImage(image, to_png(image, header), "png", True, pixels, members)


def to_png(image: SourceImage, opened: Image.Image) -> bytes:
    """A PNG of the first frame, oriented, RGB. Raises RejectedError."""
    buffer = io.BytesIO()
    oriented(image, opened).save(buffer, format="PNG")
    return buffer.getvalue()


def shrink(image: SourceImage, opened: Image.Image, short_side: int, quality: int) -> bytes:
    """A JPEG whose shorter side has so many pixels, oriented, RGB. Raises RejectedError."""
    scale = short_side / min(opened.size)
    width, height = (max(1, round(side * scale)) for side in opened.size)
    # a JPEG may be decoded at a half, a quarter ... of its size, as long as that is twice ours
    opened.draft("RGB", (2 * width, 2 * height))
    if opened.getexif().get(EXIF_ORIENTATION) in SIDEWAYS:
        width, height = height, width
    pixels = oriented(image, opened)
    buffer = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def oriented(image: SourceImage, opened: Image.Image) -> Image.Image:
    """The pixels as they are meant to be seen, RGB. Raises RejectedError."""
    try:
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedError(image, "undecodable", f"{opened.format}: {error}") from error
