"""The interface of a source of images, and what its implementations share."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from schemas.errors import UserError
from schemas.names import to_bytes
from schemas.sample import MAX_KEY_LENGTH
from schemas.storage import Store, check_regular
from schemas.tables import Reject

T = TypeVar("T")

LOCAL_READERS = 8
REMOTE_READERS = 64
"""Images, or parts of a source, that are read at a time. An object store answers after about 50 ms,
so 64 give 1,280 images/s."""

KEY_DIGITS = (8, 16, 32, MAX_KEY_LENGTH - 1)
"""Digits of a location's sha256 that keep keys apart: the first number that is enough."""

WHOLE = ""
"""The only part of a source that is listed as a whole."""

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""What archives, file servers and systems leave behind: no class and no input, as hidden ones."""


class SourceImage(NamedTuple):
    """One input.

    `key` names the sample, `location` finds the image in its source, `label` is its class (-1 for
    none), and `annotation` is text of the source's own that `Source.members` makes members of.
    """

    key: str
    location: str
    label: int
    annotation: str = ""


class LabeledText(NamedTuple):
    """An image whose label is known as text; its number follows when all labels are known."""

    image: SourceImage
    text: str


Entry = SourceImage | LabeledText | Reject


class Source(ABC):
    """Images that are somewhere. Pickled to every worker, so it holds no image and no open file.

    Attributes:
        classes: names by label, known once all images are listed; empty when nothing is labelled.
    """

    classes: Sequence[str] = ()

    def hint(self) -> str:
        """Return what a user should know where no image has a class, as the end of a sentence."""
        return ""

    def linked_folders(self) -> Sequence[str]:
        """Return the local folders outside of ROOT that listing was led to by links."""
        return ()

    @abstractmethod
    def images(self) -> Iterator[SourceImage | Reject]:
        """List every input once, in a fixed order; what cannot be an image comes as a reject."""

    @abstractmethod
    def read(self, image: SourceImage) -> bytes:
        """Return the encoded image. Raises OSError."""

    def members(self, image: SourceImage) -> dict[str, bytes]:
        """Return what is kept beside the image, by the member's extension.

        Raises:
            OSError, ValueError: it cannot be read, or is damaged.
        """
        return {}


class PartedSource(Source):
    """A source whose parts can be listed at the same time; `images` puts them together."""

    def images(self) -> Iterator[SourceImage | Reject]:
        return join_parts(self, map(self.list_part, self.parts()))

    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Return the names of parts that can be listed at the same time, in a fixed order."""

    @abstractmethod
    def list_part(self, part: str) -> Iterator[Entry]:
        """List every input of a part once, in a fixed order; several threads may do so at a time.

        Args:
            part: one of `parts`.
        """

    def number_labels(self, texts: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Number the labels that `list_part` gave as text, and set `classes`.

        Returns:
            the number of each label, and why others are no label.
        """
        raise NotImplementedError(f"{type(self).__name__} lists labels as text but numbers none")


def parts_of(source: Source) -> Sequence[str]:
    """Return the parts of a source that can be listed at the same time, [WHOLE] if it has none.

    A class that derives from a PartedSource and has `images` of its own is listed by these.
    """
    if isinstance(source, PartedSource) and type(source).images is PartedSource.images:
        return source.parts()
    return [WHOLE]


def list_part(source: Source, part: str) -> Iterable[Entry]:
    """List the inputs of a part: one of `parts_of`."""
    if isinstance(source, PartedSource) and type(source).images is PartedSource.images:
        return source.list_part(part)
    return source.images()


def join_parts(
    source: PartedSource, parts: Iterable[Iterable[Entry]]
) -> Iterator[SourceImage | Reject]:
    """Yield the inputs of the parts in order; those labeled by text come when all are known.

    Args:
        parts: of each of `source.parts()` what `source.list_part` gives.
    """
    waiting: list[LabeledText] = []
    for part in parts:
        for entry in part:
            if isinstance(entry, LabeledText):
                waiting.append(entry)
            else:
                yield entry
    if waiting:
        numbers, bad = source.number_labels({entry.text for entry in waiting})
        yield from (number_label(entry, numbers, bad) for entry in waiting)


def number_label(
    entry: LabeledText, numbers: Mapping[str, int], bad: Mapping[str, str]
) -> SourceImage | Reject:
    """Return the image with the number of its label, or a reject if it has none.

    Args:
        numbers, bad: as `PartedSource.number_labels` returns them.
    """
    if entry.text in bad:
        return Reject(entry.image.location, "bad-label", bad[entry.text])
    return entry.image._replace(label=numbers[entry.text])


def count_readers(source: Source) -> int:
    """Return how many images to read at a time: more where one of the source's stores is remote."""
    stores = [value for value in vars(source).values() if isinstance(value, Store)]
    is_remote = any(not store.is_local for store in stores)
    return REMOTE_READERS if is_remote else LOCAL_READERS


def key_of(location: str) -> str:
    """A sample's key from its path below the root, without the extension.

    `a/b.jpg` becomes `a_b`. Where other characters have to be replaced too, or the path is too
    long, eight digits of its sha256 keep different paths apart.
    """
    stem = str(PurePosixPath(location).with_suffix("")).replace("/", "_")
    key = re.sub(r"[^0-9A-Za-z_-]", "_", stem)
    if key != stem or len(key) > MAX_KEY_LENGTH:
        key = digest_key(key, location)
    return key


def digest_key(key: str, location: str, digits: int = 8) -> str:
    """Return the key with so many digits of the sha256 of its location behind it."""
    digest = hashlib.sha256(to_bytes(location)).hexdigest()[:digits]
    return f"{key[: MAX_KEY_LENGTH - 1 - digits]}-{digest}"


def free_key(key: str, location: str, taken: Container[str]) -> str:
    """Return the key with as many digits as it needs to differ from those that are taken."""
    return next(
        candidate
        for digits in KEY_DIGITS
        if (candidate := digest_key(key, location, digits)) not in taken
    )


def walk_order(location: str) -> list[tuple[bool, str]]:
    """Sort locations as a tree is listed: the files of a folder before those of its folders."""
    *folders, name = location.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def is_pattern(root: str) -> bool:
    """Whether ROOT is a glob; a file or folder with such signs in its name is none."""
    return any(sign in root for sign in "*?[") and not Store(root).exists("")


def check_split(dataset: str, split: str, known: Sequence[str]) -> None:
    """Raises UserError that lists the splits."""
    if split not in known:
        raise UserError(f"{dataset} has no split {split!r}: there are {', '.join(known)}")


def opened(
    dataset: str,
    root: str,
    make: Callable[[], T],
    needs: Sequence[str] = (),
    download: bool = False,
) -> T:
    """Let torchvision open a tree, after a look at what it would open or make.

    torchvision makes the folder of some sets before it finds that they are not there, and speaks of
    its own arguments; here a wrong ROOT stays as it is, and the message names what is missing.

    Args:
        needs: files and folders below ROOT without which there is no such set.
        download: whether torchvision fetches it, so that nothing need be there.

    Raises:
        UserError: with the reason.
    """
    if not root:
        raise UserError(f"--root is missing: the folder that {dataset} is in")
    store = Store(root)
    if not download:
        for name in needs:
            if not store.exists(name):
                raise UserError(not_there(dataset, root, f"{name} is missing"))
            if store.is_local and not store.is_folder(name):
                try:
                    check_regular(store.path(name))
                except OSError as error:
                    raise UserError(not_there(dataset, root, f"{name} is {error}")) from error
    try:
        return make()
    except UserError:
        raise
    except Exception as error:
        if download and isinstance(error, OSError):
            raise UserError(f"{root}: {dataset} could not be downloaded: {error}") from error
        reason = f"its files are not found or corrupted: {type(error).__name__}"
        if isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        elif isinstance(error, RuntimeError):  # torchvision has compared checksums
            reason = f"{', '.join(needs) or 'its files'}: not found or corrupted"
        raise UserError(not_there(dataset, root, reason)) from error


def not_there(dataset: str, root: str, reason: str) -> str:
    return f"{root}: no {dataset} as torchvision lays it out ({reason}); --download fetches it"


def class_folders(store: Store, advice: str = "") -> list[str]:
    """Return the sorted names of the folders in a folder that are not hidden, nor a system's own.

    Raises:
        UserError: there is no such folder.
    """
    if not store.exists(""):
        raise UserError(f"{store.url}: no such folder; {advice}".rstrip("; "))
    if not store.is_folder(""):
        raise UserError(f"{store.url}: not a folder; {advice}".rstrip("; "))
    return [n for n in store.folders() if not n.startswith(".") and n not in SYSTEM_FOLDERS]


def visible(store: Store, folder: str, below: bool = True) -> Iterator[str]:
    """List the files in a folder, and below it, none of them hidden."""
    for location in store.walk(folder) if below else store.names(folder):
        parts = PurePosixPath(location).parts
        if not any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts):
            yield location
