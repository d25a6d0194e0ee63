"""Encoded bytes -> pixels, by the decoder that the training loader uses.

What is called readable here is what DALI reads in training: a corrupt image stops a DALI pipeline
and cannot be skipped there, so none may get into a shard. Where there is a GPU it decodes there, as
the loader does.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from nvidia.dali import types

from precompute.encode import EncodedImage, RejectedError, read_by_pillow, rejecting
from schemas.tables import Reject

PIXELS_AT_ONCE = 2**27
"""Decoded together, but for an image that is larger alone: 400 MB. Photos of ImageNet have 0.2
million pixels, so this only parts batches of very large images, which would not fit in memory."""


def decode(images: list[EncodedImage]) -> tuple[list[EncodedImage], Any, list[Reject]]:
    """Decode a batch; where it fails, one by one, to find which.

    What DALI cannot read but Pillow can is re-encoded.

    Returns:
        the images that decode, their pixels as a DALI batch of (height, width, 3) uint8 RGB with
        EXIF orientation applied (None when there are none), and the others.
    """
    try:
        return images, decode_batch(images), []
    except Exception:  # a damaged image may raise anything; which one it is shows below
        good, rejects = [], []
        for encoded in images:
            try:
                good.append(readable(encoded))
            except RejectedError as error:
                rejects.append(error.reject)
    return good, decode_batch(good) if good else None, rejects


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
    """The image as it is, or re-encoded, such that DALI decodes it. Raises RejectedError."""
    try:
        decode_batch([encoded])
    except Exception:  # as above
        encoded = read_by_pillow(encoded)
        with rejecting(encoded.image, "DALI does not read its re-encoded copy"):
            decode_batch([encoded])
    return encoded


def decode_batch(images: list[EncodedImage]) -> Any:
    encoded = ndd.as_batch([np.frombuffer(image.content, np.uint8) for image in images])
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return ndd.decoders.image(encoded, device=device, output_type=types.RGB).evaluate()
