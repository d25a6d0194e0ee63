"""What DALI says when it cannot go on, in a line that names the sample and what to do."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from PIL import Image

from pipeline.shards import EncodedBatch
from schemas import UserError

MEMORY = re.compile("bad_alloc|out of memory|memory allocation", re.IGNORECASE)


@contextmanager
def translate_dali_errors(
    url: str, in_flight: Callable[[], Iterable[EncodedBatch]] = tuple
) -> Iterator[None]:
    """Turn an error of DALI's about the dataset at `url` into a UserError of one line.

    Args:
        in_flight: returns the batches that DALI works on; one of them has the sample.
    """
    try:
        yield
    except RuntimeError as error:
        raise UserError(explain(str(error), url, in_flight())) from error


def explain(message: str, url: str, in_flight: Iterable[EncodedBatch]) -> str:
    """Return one line that says what happened, where, and what to do."""
    said = message.partition("encountered:")[2].strip() or message
    reason, *_ = said.splitlines()
    if MEMORY.search(message):
        return f"{url}: DALI is out of memory ({reason}); a smaller batch or crop needs less"
    where = find_unreadable(in_flight) if "decoders.image" in message else None
    return (
        f"{where or url}: {reason}; `python -m schemas verify {url}` "
        "shows what is not as it was written: copy that shard anew, or write the dataset again "
        "without the sample"
    )


def find_unreadable(in_flight: Iterable[EncodedBatch]) -> str | None:
    """Name shard and key of the first image or map that Pillow cannot decode either, if any."""
    for batch in in_flight:
        for row, contents in enumerate(zip(batch.images, batch.maps, strict=True)):
            try:
                for content in contents:
                    Image.open(io.BytesIO(content.tobytes())).load()
            except (OSError, SyntaxError, ValueError):  # UnidentifiedImageError is an OSError
                return f"{batch.tars[row]}: sample {batch.keys[row]}"
    return None
