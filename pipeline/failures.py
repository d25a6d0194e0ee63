"""Translate DALI's errors into one line that names the sample and says what to do."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from PIL import Image

from pipeline.shards import EncodedBatch
from schemas import UserError
from schemas.device_errors import classify_error, first_line


@contextmanager
def translate_dali_errors(
    url: str, in_flight: Callable[[], Iterable[EncodedBatch]] = tuple
) -> Iterator[None]:
    """Turn a DALI error about the dataset at `url` into a UserError of one line.

    Args:
        in_flight: returns the batches that DALI is working on; one of them has the sample.
    """
    try:
        yield
    except RuntimeError as error:
        raise UserError(explain(str(error), url, in_flight())) from error


def explain(message: str, url: str, in_flight: Iterable[EncodedBatch]) -> str:
    """Return a one-line message: what happened, where, and what to do."""
    reason, kind = first_line(message), classify_error(message)
    if kind == "memory":
        return f"{url}: DALI is out of memory ({reason}); a smaller batch or crop needs less"
    if kind == "device":
        return (
            f"the GPU failed ({reason}); the shards are intact: check `nvidia-smi` and the system "
            "log, then run the same command again to resume"
        )
    where = find_unreadable(in_flight) if "decoders.image" in message else None
    return (
        f"{where or url}: {reason}; `saliency-shards verify {url}` lists damaged files; copy the "
        "damaged shard again, or rebuild the dataset without this sample"
    )


def find_unreadable(in_flight: Iterable[EncodedBatch]) -> str | None:
    """Name the shard and key of the first image or map that Pillow cannot decode either, if any."""
    for batch in in_flight:
        for row, contents in enumerate(zip(batch.images, batch.maps, strict=True)):
            try:
                with without_size_limit():
                    for content in contents:
                        Image.open(io.BytesIO(content.tobytes())).load()
            except Exception:  # decoders raise errors of many classes
                return f"{batch.shards[row]}.tar: sample {batch.keys[row]}"
    return None


@contextmanager
def without_size_limit() -> Iterator[None]:
    """Lift Pillow's size limit, because the loader decodes the dataset's pictures anyway."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
