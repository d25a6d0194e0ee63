"""Decode images with the decoder that the training loader uses.

An image is readable if DALI can read it in training: a corrupt image stops a DALI pipeline and
cannot be skipped there, so none may get into a shard. If there is a GPU, images are decoded on it,
as the loader does.
"""

import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from nvidia.dali import types
from PIL import Image

from precompute.device_failure import build_device_error, classify
from precompute.reencode import EncodedImage, RejectedError, read_by_pillow
from precompute.sources import SourceImage
from schemas.device_errors import first_line
from schemas.tables import Reject

PIXELS_AT_ONCE = 2**27
"""Maximum number of pixels decoded together (400 MB), unless a single image has more. ImageNet's
photos have 0.2 million pixels, so this splits only batches of very large images, which would not
fit in memory."""


def decode(images: list[EncodedImage]) -> tuple[list[EncodedImage], Any, list[Reject]]:
    """Decode a batch; if that fails, decode the images one by one to find those at fault.

    Images that DALI cannot read but Pillow can are re-encoded.

    Returns:
        the images that decode, their pixels as a DALI batch of (height, width, 3) uint8 RGB with
        EXIF orientation applied (None when there are none), and the rejects.

    Raises:
        UserError: the decoder itself fails whatever the image, because memory has run out or the
            GPU is in error. No image is rejected then.
    """
    try:
        return images, decode_batch(images), []
    except Exception as error:  # a damaged image may raise anything; it is identified below
        raise_unless_decoder_works(error)
        good, rejects = [], []
        for encoded in images:
            try:
                good.append(make_readable(encoded))
            except RejectedError as rejected:
                rejects.append(rejected.reject)
    try:
        return good, decode_batch(good) if good else None, rejects
    except Exception as error:  # each image was just decoded on its own, so none is at fault
        raise build_device_error(error, "the decoder fails") from error


def raise_unless_decoder_works(error: Exception) -> None:
    """Return if only the image of a failed decode can be at fault for `error`.

    Raises:
        UserError: the error's text names a GPU or memory, or a JPEG that is known to be good does
            not decode either. After some CUDA errors every later call fails, so every following
            image would be rejected although it is valid.
    """
    if classify(error) != "data":
        raise build_device_error(error, "the decoder fails") from error
    try:
        decode_batch([encode_good_jpeg()])
    except Exception as second:
        raise build_device_error(
            second, "a JPEG that is known to be good does not decode"
        ) from second


@cache
def encode_good_jpeg() -> EncodedImage:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    image = SourceImage("known-good", "known-good.jpg", -1)
    return EncodedImage(image, buffer.getvalue(), "jpg", False, 256 * 256, {})


def split_by_pixels(images: list[EncodedImage]) -> Iterator[list[EncodedImage]]:
    """Split images, in order, into groups of at most `PIXELS_AT_ONCE` pixels or a single image."""
    group: list[EncodedImage] = []
    pixels = 0
    for image in images:
        if group and pixels + image.pixels > PIXELS_AT_ONCE:
            yield group
            group, pixels = [], 0
        group.append(image)
        pixels += image.pixels
    if group:
        yield group


def make_readable(encoded: EncodedImage) -> EncodedImage:
    """Return an image that DALI decodes: the one given, or a re-encoded copy of it.

    Raises:
        RejectedError: it does not decode.
        UserError: the decoder itself fails.
    """
    try:
        decode_batch([encoded])
    except Exception as error:  # a damaged image may raise anything
        raise_unless_decoder_works(error)
        return reencode(encoded)
    return encoded


def reencode(encoded: EncodedImage) -> EncodedImage:
    """Re-encode an image that only Pillow reads as a PNG that DALI decodes.

    Raises:
        RejectedError: it does not decode.
        UserError: the decoder itself fails.
    """
    png = read_by_pillow(encoded)
    try:
        decode_batch([png])
    except Exception as error:
        raise_unless_decoder_works(error)
        detail = f"DALI does not read its re-encoded copy: {first_line(str(error))}"
        raise RejectedError(encoded.image, "undecodable", detail) from error
    return png


def decode_batch(images: list[EncodedImage]) -> Any:
    # NumPy's view of bytes is read-only, so DALI copies it into memory of its own
    encoded = ndd.as_batch([np.frombuffer(image.content, np.uint8) for image in images])
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return ndd.decoders.image(encoded, device=device, output_type=types.RGB).evaluate()
