"""Encoded bytes -> pixels, by the decoder that the training loader uses.

What is called readable here is what DALI reads in training: a corrupt image stops a DALI pipeline
and cannot be skipped there, so none may get into a shard.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
from nvidia.dali import types
from PIL import Image, ImageOps, UnidentifiedImageError

from precompute.sources import SourceImage
from schemas.sample import IMAGE_EXTENSIONS
from schemas.tables import Reject


@dataclass(frozen=True)
class EncodedImage:
    """An input that looks like an image; its pixels are not read yet."""

    image: SourceImage
    content: bytes
    extension: str
    reencoded: bool


class RejectedError(Exception):
    """This input cannot be written. Carries the row for rejects.parquet."""

    def __init__(self, image: SourceImage, reason: str, detail: str):
        super().__init__(detail)
        self.reject = Reject(image.location, reason, detail)


def check(image: SourceImage, content: bytes) -> EncodedImage:
    """Look at the header: the format by its content, not by the file's name.

    Formats that DALI does not read are decoded by Pillow and re-encoded as PNG, without loss, their
    first frame, oriented.

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
    extension = IMAGE_EXTENSIONS.get(header.format or "")
    if extension:
        return EncodedImage(image, content, extension, reencoded=False)
    return EncodedImage(image, reencode(image, header), "png", reencoded=True)


def reencode(image: SourceImage, opened: Image.Image) -> bytes:
    """A PNG of the first frame, oriented, RGB. Raises RejectedError."""
    try:
        pixels = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise RejectedError(image, "undecodable", f"{opened.format}: {error}") from error
    buffer = io.BytesIO()
    pixels.save(buffer, format="PNG")
    return buffer.getvalue()


def decode(images: list[EncodedImage]) -> tuple[list[EncodedImage], Any, list[Reject]]:
    """Decode a batch; where it fails, one by one, to find which.

    A TIFF that DALI cannot read but Pillow can is re-encoded.

    Returns:
        the images that decode, their pixels as a DALI batch of (height, width, 3) uint8 RGB with
        EXIF orientation applied (None when there are none), and the others.
    """
    try:
        return images, decode_batch(images), []
    except RuntimeError:
        good, rejects = [], []
        for encoded in images:
            try:
                good.append(readable(encoded))
            except RejectedError as error:
                rejects.append(error.reject)
    return good, decode_batch(good) if good else None, rejects


def readable(encoded: EncodedImage) -> EncodedImage:
    """The image as it is, or re-encoded, such that DALI decodes it. Raises RejectedError."""
    try:
        decode_batch([encoded])
    except RuntimeError as error:
        if encoded.extension != "tiff":
            detail = "damaged or cut short; replace or remove it"
            raise RejectedError(encoded.image, "undecodable", detail) from error
        png = reencode(encoded.image, Image.open(io.BytesIO(encoded.content)))
        return EncodedImage(encoded.image, png, "png", reencoded=True)
    return encoded


def decode_batch(images: list[EncodedImage]) -> Any:
    encoded = ndd.as_batch([np.frombuffer(image.content, np.uint8) for image in images])
    return ndd.decoders.image(encoded, device="cpu", output_type=types.RGB).evaluate()
