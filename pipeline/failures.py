"""What DALI says when a shard is broken, in a line that names shard and sample and what to do."""

import io
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fsspec
from PIL import Image, UnidentifiedImageError

from schemas import UserError
from schemas.device_errors import classify_error, first_line
from schemas.sample import IMAGE_EXTENSIONS

SOURCE = re.compile(
    r"(?P<shard>[^\s\"':]*(?:://)?[^\s\"':]*\.(?:tar|idx))(?::\d+:(?P<member>\S+))?"
)
SEARCH_SECONDS = 30
"""How long to look for a sample that DALI does not name: a job should end within a minute."""


@contextmanager
def explained(url: str, tars: Sequence[str]) -> Iterator[None]:
    """Turns an error of DALI's about the dataset at `url` into a UserError of one line."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(explanation(str(error), url, tars)) from error


def explanation(message: str, url: str, tars: Sequence[str]) -> str:
    reason = first_line(message)
    kind = classify_error(message)
    if kind == "memory":
        return f"{url}: DALI is out of memory ({reason}); a smaller batch or crop needs less"
    if kind == "device":
        return (
            f"the GPU fails ({reason}), no shard is to blame: look at `nvidia-smi` and the "
            "system's log, then run the same command again to resume"
        )
    place = SOURCE.search(reason)
    if place and place["member"]:
        where = f"{place['shard']}: sample {place['member'].partition('.')[0]}"
    elif place:
        where = place["shard"]
    elif "decoders.image" in message:
        where = unreadable(tars)
    else:
        where = url
    return (
        f"{where}: {reason}; `python -m schemas verify {url}` shows what is not as it was written: "
        "copy that shard anew, or write the dataset again without the sample"
    )


def unreadable(tars: Sequence[str]) -> str:
    """The first sample whose image has no header that PIL knows, if there is time to find it."""
    end = time.monotonic() + SEARCH_SECONDS
    for place, tar in enumerate(tars):
        with fsspec.open(tar) as file, tarfile.open(fileobj=file) as members:
            for member in members:
                if time.monotonic() > end:
                    return f"an image in the {len(tars) - place} shards from {tar} on"
                key, _, extension = member.name.partition(".")
                content = members.extractfile(member)
                if content is None or extension not in IMAGE_EXTENSIONS.values():
                    continue
                try:
                    Image.open(io.BytesIO(content.read())).verify()
                except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
                    return f"{tar}: sample {key}"
    return f"an image in one of {len(tars)} shards"
