"""What every source of images is."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from schemas.errors import UserError
from schemas.sample import MAX_KEY_LENGTH
from schemas.tables import Reject

T = TypeVar("T")


class SourceImage(NamedTuple):
    """One input.

    `key` names the sample, `location` finds the image in its source, `label` is its class (-1 for
    none), and `annotation` is text of the source's own that `Source.members` makes members of.
    """

    key: str
    location: str
    label: int
    annotation: str = ""


class Source(ABC):
    """Images that are somewhere. Pickled to every worker, so it holds no image and no open file.

    Attributes:
        classes: names by label, known once all images are listed; empty when nothing is labelled.
    """

    classes: Sequence[str] = ()

    @abstractmethod
    def images(self) -> Iterator[SourceImage | Reject]:
        """Lists every input once, in a fixed order; what cannot be an image comes as a reject."""

    @abstractmethod
    def read(self, image: SourceImage) -> bytes:
        """The encoded image. Raises OSError."""

    def members(self, image: SourceImage) -> dict[str, bytes]:
        """What is kept beside the image, by the member's extension. Raises OSError, ValueError."""
        return {}


def key_of(location: str) -> str:
    """A sample's key from its path below the root, without the extension.

    `a/b.jpg` becomes `a_b`. Where other characters have to be replaced too, or the path is too
    long, eight digits of its sha256 keep different paths apart.
    """
    stem = str(PurePosixPath(location).with_suffix("")).replace("/", "_")
    key = re.sub(r"[^0-9A-Za-z_-]", "_", stem)
    if key != stem or len(key) > MAX_KEY_LENGTH:
        digest = hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        key = f"{key[: MAX_KEY_LENGTH - 9]}-{digest}"
    return key


def check_split(dataset: str, split: str, known: Sequence[str]) -> None:
    """Raises UserError that lists the splits."""
    if split not in known:
        raise UserError(f"{dataset} has no split {split!r}: there are {', '.join(known)}")


def opened(dataset: str, root: str, make: Callable[[], T]) -> T:
    """What torchvision makes of a tree. Raises UserError with its reason where it cannot."""
    if not root:
        raise UserError(f"--root is missing: the folder that {dataset} is in")
    try:
        return make()
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).replace("You can use download=True to download it", "").strip(" .")
        raise UserError(
            f"{root}: no {dataset} as torchvision lays it out ({reason}); --download fetches it"
        ) from error
