"""Check the headers of input images, and re-encode or shrink them where needed."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from precompute.device_failure import build_device_error
from precompute.formats import name_format
from precompute.pixels import to_rgb
from precompute.sources import SourceImage
from schemas.errors import UserError
from schemas.sample import IMAGE_EXTENSIONS
from schemas.tables import Reject

# Pillow warns at 89 million pixels and refuses at twice that; only the latter is a limit here. The
# filter is set once, because warnings.catch_warnings is not safe in the threads that read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_JPEG_SIDE = 65500
"""Longest side of a JPEG that libjpeg can write, in pixels."""

MISREAD_BY_DALI = {"TIFF": {"LA", "La", "PA", "F", "LAB"}}
"""Pillow's modes, by format, that DALI 2.4 reads without an error but wrongly: it takes alpha for a
color, clips floats outside of 0 .. 1, or takes L*a*b* for RGB."""


@dataclass(frozen=True)
class Resize:
    """Options for shrinking large images before they are written; smaller ones stay unchanged.

    Attributes:
        short_side: pixels of the shorter side; the aspect ratio is kept (evaluation protocols on
            ImageNet resize to 256). None: the bytes of every image stay unchanged.
        quality: quality of the JPEG that is written, 1 .. 95 (the default is our choice).
    """

    short_side: int | None = None
    quality: int = 90

    def __post_init__(self) -> None:
        if self.short_side is None and self.quality != Resize.quality:
            raise UserError("--resize-quality: give --resize too; without it no image is changed")
        if self.short_side is not None and self.short_side < 1:
            raise UserError(f"--resize is {self.short_side}; it must be at least 1 pixel")
        if not 1 <= self.quality <= 95:
            raise UserError(f"--resize-quality is {self.quality}; it must be in 1 .. 95")


@dataclass(frozen=True)
class EncodedImage:
    """An input whose header is that of an image; its pixels have not been decoded yet.

    Attributes:
        image: the input in its source.
        content: the bytes to write.
        extension: the extension of `content`'s format.
        reencoded: whether `content` differs from the input's own bytes.
        pixels: number of pixels according to the input's header.
        members: other members of the sample, by extension.
    """

    image: SourceImage
    content: bytes
    extension: str
    reencoded: bool
    pixels: int
    members: dict[str, bytes]


class RejectedError(Exception):
    """Raised for an input that cannot be written; carries its row of rejects.parquet."""

    def __init__(self, image: SourceImage, reason: str, detail: str):
        super().__init__(detail)
        self.reject = Reject(image.location, reason, detail)


@contextmanager
def translate_decoder_errors(image: SourceImage, name: str) -> Iterator[None]:
    """Turn any error of a decoder, of EXIF parsing or of a codec's plug-in into a RejectedError.

    The classes of these errors carry no information: damaged inputs raise OSError, SyntaxError,
    OverflowError, RuntimeError, struct.error, ZeroDivisionError and more, and a plug-in written in
    Rust raises a BaseException.

    Args:
        name: the format's name, for the reject.

    Raises:
        RejectedError: the image is at fault.
        UserError: memory has run out; the message names the image, which may be valid.
    """
    try:
        yield
    except (RejectedError, KeyboardInterrupt, GeneratorExit):
        raise
    except MemoryError as error:
        raise build_device_error(error, f"{image.location}: Pillow does not decode it") from error
    except Image.DecompressionBombError as error:
        raise RejectedError(image, "too-large", str(error)) from error
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RejectedError(image, "undecodable", f"{name}: {reason}") from error


def check(
    image: SourceImage, content: bytes, members: dict[str, bytes], resize: Resize
) -> EncodedImage:
    """Check an image's header; the format is that of the content, not of the file's name.

    Formats that DALI does not read are decoded by Pillow, and their first frame is oriented and
    re-encoded as PNG, without loss. Images larger than `resize` allows become JPEGs.

    Raises:
        RejectedError: it is empty, not an image, has too many pixels, or cannot be decoded.
    """
    if not content:
        raise RejectedError(image, "empty", "the file has no bytes; replace or remove it")
    with translate_decoder_errors(image, "its header is damaged"):
        try:
            header = Image.open(io.BytesIO(content))
        except UnidentifiedImageError as error:
            if name := name_format(content):
                detail = f"{name}, which is not supported; convert it to JPEG or PNG"
                raise RejectedError(image, "undecodable", detail) from error
            detail = "no known image format; replace or remove it"
            raise RejectedError(image, "not-an-image", detail) from error
    if min(header.size) < 1:
        detail = f"{header.width} x {header.height} pixels; replace or remove it"
        raise RejectedError(image, "undecodable", detail)
    pixels = header.width * header.height
    name = header.format or ""
    extension = IMAGE_EXTENSIONS.get(name)
    if resize.short_side is not None and min(header.size) > resize.short_side:
        smaller, extension = shrink(image, header, resize.short_side, resize.quality)
        return EncodedImage(image, smaller, extension, True, pixels, members)
    if extension and header.mode not in MISREAD_BY_DALI.get(name, ()):
        return EncodedImage(image, content, extension, False, pixels, members)
    return EncodedImage(image, to_png(image, header), "png", True, pixels, members)


def to_png(image: SourceImage, opened: Image.Image) -> bytes:
    """Return the first frame as an oriented RGB PNG. Raises RejectedError."""
    with translate_decoder_errors(image, opened.format or "image"):
        buffer = io.BytesIO()
        apply_orientation(opened).save(buffer, format="PNG")
        return buffer.getvalue()


def shrink(
    image: SourceImage, opened: Image.Image, short_side: int, quality: int
) -> tuple[bytes, str]:
    """Resize an image to this shorter side, oriented and as RGB. Raises RejectedError.

    Returns:
        a JPEG, or a PNG if a side is too long for a JPEG, and its extension.
    """
    with translate_decoder_errors(image, opened.format or "image"):
        scale = short_side / min(opened.size)
        width, height = (max(1, round(side * scale)) for side in opened.size)
        # faster: lets libjpeg decode at 1/2, 1/4 ... of the size, but at twice the target or more
        opened.draft("RGB", (2 * width, 2 * height))
        pixels = apply_orientation(opened)
        # Pillow gives the size of a TIFF after orientation, but that of a JPEG or PNG before it
        short, long = sorted((width, height))
        size = (long, short) if pixels.width > pixels.height else (short, long)
        pixels = pixels.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if max(pixels.size) > MAX_JPEG_SIDE:
            pixels.save(buffer, "PNG")
            return buffer.getvalue(), "png"
        pixels.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue(), "jpg"


def apply_orientation(opened: Image.Image) -> Image.Image:
    """Return the image as RGB with EXIF orientation applied. Raises whatever the decoder raises."""
    return to_rgb(ImageOps.exif_transpose(opened))


def read_by_pillow(encoded: EncodedImage) -> EncodedImage:
    """Re-encode an image that DALI does not read as a lossless PNG. Raises RejectedError."""
    if encoded.reencoded:
        raise RejectedError(encoded.image, "undecodable", "DALI does not read its re-encoded copy")
    with translate_decoder_errors(encoded.image, "damaged or cut short; replace or remove it"):
        opened = Image.open(io.BytesIO(encoded.content))
    png = to_png(encoded.image, opened)
    return EncodedImage(encoded.image, png, "png", True, encoded.pixels, encoded.members)
