"""Encoded bytes -> pixels, by the decoder that the training loader uses.

What is called readable here is what DALI reads in training: a corrupt image stops a DALI pipeline
and cannot be skipped there, so none may get into a shard. Where there is a GPU it decodes there, as
the loader does.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from nvidia.dali import types
from PIL import Image

from precompute.device_failure import device_error
from precompute.encode import EncodedImage, RejectedError, to_png
from precompute.sources import SourceImage
from schemas.device_errors import classify_error
from schemas.tables import Reject

PIXELS_AT_ONCE = 2**27
"""Decoded together, but for an image that is larger alone: 400 MB. Photos of ImageNet have 0.2
million pixels, so this only parts batches of very large images, which would not fit in memory."""


def decode(images: list[EncodedImage]) -> tuple[list[EncodedImage], Any, list[Reject]]:
    """Decode a batch; where it fails, one by one, to find the images at fault.

    A TIFF that DALI cannot read but Pillow can is re-encoded.

    Returns:
        the images that decode, their pixels as a DALI batch of (height, width, 3) uint8 RGB with
        EXIF orientation applied (None when there are none), and the others.

    Raises:
        UserError: the decoder itself fails, whatever the image: no memory is left, the GPU is in
            error. Nothing is rejected then.
    """
    try:
        return images, decode_batch(images), []
    except RuntimeError as error:
        raise_unless_decoder_works(error)
        good, rejects = [], []
        for encoded in images:
            try:
                good.append(readable(encoded))
            except RejectedError as rejected:
                rejects.append(rejected.reject)
    try:
        return good, decode_batch(good) if good else None, rejects
    except RuntimeError as error:  # each of them was decoded alone a moment ago
        raise device_error(error, "the decoder fails") from error


def raise_unless_decoder_works(error: RuntimeError) -> None:
    """Return if only the image of a failed decode can be at fault for `error`.

    Raises:
        UserError: the error's text names a GPU or memory, or a JPEG that is known to be good does
            not decode either. After some errors of CUDA every later call fails, so images would be
            rejected one after the other, all of them sound.
    """
    if classify_error(str(error)) != "data":
        raise device_error(error, "the decoder fails") from error
    try:
        decode_batch([good_jpeg()])
    except RuntimeError as second:
        raise device_error(second, "a JPEG that is known to be good does not decode") from second


@cache
def good_jpeg() -> EncodedImage:
    buffer = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG")
    image = SourceImage("known-good", "known-good.jpg", -1)
    return EncodedImage(image, buffer.getvalue(), "jpg", False, 256 * 256, {})


def within_memory(images: list[EncodedImage]) -> Iterator[list[EncodedImage]]:
    """The same images in order, in groups of at most `PIXELS_AT_ONCE`, or of one."""
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


def readable(encoded: EncodedImage) -> EncodedImage:
    """Return the image as it is, or re-encoded, such that DALI decodes it.

    Raises:
        RejectedError: it does not decode.
        UserError: the decoder itself fails.
    """
    try:
        decode_batch([encoded])
    except RuntimeError as error:
        raise_unless_decoder_works(error)
        if encoded.extension != "tiff":
            detail = "damaged or cut short; replace or remove it"
            raise RejectedError(encoded.image, "undecodable", detail) from error
        png = to_png(encoded.image, Image.open(io.BytesIO(encoded.content)))
        return replace(encoded, content=png, extension="png", reencoded=True)
    return encoded


def decode_batch(images: list[EncodedImage]) -> Any:
    encoded = ndd.as_batch([np.frombuffer(image.content, np.uint8) for image in images])
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return ndd.decoders.image(encoded, device=device, output_type=types.RGB).evaluate()
