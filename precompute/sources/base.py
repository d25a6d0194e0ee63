"""The interface of image sources, and helpers shared by the implementations."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, TypeVar

from schemas.errors import UserError
from schemas.names import to_bytes
from schemas.parallel import map_ahead
from schemas.sample import MAX_KEY_LENGTH
from schemas.storage import Store, check_regular
from schemas.tables import Reject

T = TypeVar("T")

LOCAL_READERS = 8
REMOTE_READERS = 64
"""Number of images, or parts of a source, read in parallel. An object store answers after about
50 ms, so 64 readers give 1,280 images/s."""

KEY_DIGITS = (8, 16, 32, MAX_KEY_LENGTH - 1)
"""Numbers of digits of a location's sha256 to try, in order, until a key is unique."""

WHOLE = ""
"""Name of the only part of a source that cannot be listed in parts."""

SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders left by archives, file servers and operating systems; ignored like hidden ones."""


class SourceImage(NamedTuple):
    """One image of a source, not read yet.

    Attributes:
        key: key of the sample.
        location: position of the image in its source, such as a path.
        label: number of its class; -1 for none.
        annotation: text in a format of the source, which `Source.members` turns into members.
    """

    key: str
    location: str
    label: int
    annotation: str = ""


class LabeledText(NamedTuple):
    """An image whose label is text; labels are numbered once all of them are known."""

    image: SourceImage
    text: str


Entry = SourceImage | LabeledText | Reject


class Source(ABC):
    """Base class of image sources. Pickled to every worker, so it holds no image and no open file.

    Attributes:
        classes: class names by label, complete once all images are listed; empty without labels.
        readers: number of images, or parts, to read in parallel, final once all images are listed;
            None for a number that depends on whether a store in the source's attributes is remote.
    """

    classes: Sequence[str] = ()
    readers: int | None = None

    def hint(self) -> str:
        """Return a hint for the user if no image has a class, as the end of a sentence."""
        return ""

    def linked_folders(self) -> Sequence[str]:
        """Return the local folders outside of ROOT that listing reached through links."""
        return ()

    @abstractmethod
    def images(self) -> Iterator[SourceImage | Reject]:
        """List every input once, in a fixed order; yield a reject for what cannot be an image."""

    @abstractmethod
    def read(self, image: SourceImage) -> bytes:
        """Return the encoded image. Raises OSError."""

    def members(self, image: SourceImage) -> dict[str, bytes]:
        """Return further members of the image's sample, by extension.

        Raises:
            OSError, ValueError: they cannot be read, or are damaged.
        """
        return {}


class PartedSource(Source):
    """A source whose parts can be listed in parallel; `images` joins their listings."""

    def images(self) -> Iterator[SourceImage | Reject]:
        return join_parts(self, map(self.list_part, self.parts()))

    @abstractmethod
    def parts(self) -> Sequence[str]:
        """Return the names of parts that can be listed in parallel, in a fixed order."""

    @abstractmethod
    def list_part(self, part: str) -> Iterator[Entry]:
        """List every input of a part once, in a fixed order; may be called by several threads.

        Args:
            part: one of `parts`.
        """

    def number_labels(self, texts: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        """Number the labels that `list_part` gave as text, and set `classes`.

        Returns:
            the number of each valid label, and the reason for each invalid one.
        """
        raise NotImplementedError(f"{type(self).__name__} lists labels as text but numbers none")


def list_parts(source: Source) -> Sequence[str]:
    """Return the parts of a source that can be listed in parallel; [WHOLE] if it has none.

    A subclass of PartedSource that overrides `images` counts as having none.
    """
    if isinstance(source, PartedSource) and type(source).images is PartedSource.images:
        return source.parts()
    return [WHOLE]


def list_part(source: Source, part: str) -> Iterable[Entry]:
    """List the inputs of one part.

    Args:
        part: one of `list_parts(source)`.
    """
    if isinstance(source, PartedSource) and type(source).images is PartedSource.images:
        return source.list_part(part)
    return source.images()


def list_in_parallel(source: Source, parts: Sequence[str]) -> Iterable[Iterable[Entry]]:
    """List several parts at a time, and yield the inputs of each part in order.

    A single part may be of any length, so it is not gathered in memory.

    Args:
        parts: some of `list_parts(source)`.
    """
    if len(parts) == 1:
        return [list_part(source, parts[0])]
    return map_ahead(lambda part: list(list_part(source, part)), parts, count_readers(source))


def join_parts(
    source: PartedSource, parts: Iterable[Iterable[Entry]]
) -> Iterator[SourceImage | Reject]:
    """Yield the inputs of all parts in order; those with text labels come last.

    Args:
        parts: the listing of each of `source.parts()` by `source.list_part`.
    """
    waiting: list[LabeledText] = []
    for part in parts:
        for entry in part:
            if isinstance(entry, LabeledText):
                waiting.append(entry)
            else:
                yield entry
    if waiting:
        numbers, invalid_labels = source.number_labels({entry.text for entry in waiting})
        yield from (number_label(entry, numbers, invalid_labels) for entry in waiting)


def number_label(
    entry: LabeledText, numbers: Mapping[str, int], invalid_labels: Mapping[str, str]
) -> SourceImage | Reject:
    """Return the image with the number of its label, or a reject if the label is invalid.

    Args:
        numbers, invalid_labels: the results of `PartedSource.number_labels`.
    """
    if entry.text in invalid_labels:
        return Reject(entry.image.location, "bad-label", invalid_labels[entry.text])
    return entry.image._replace(label=numbers[entry.text])


def count_readers(source: Source) -> int:
    """Return how many images, or parts, of a source to read in parallel; see `Source.readers`."""
    if source.readers is not None:
        return source.readers
    stores = [value for value in vars(source).values() if isinstance(value, Store)]
    is_remote = any(not store.is_local for store in stores)
    return REMOTE_READERS if is_remote else LOCAL_READERS


def key_of(location: str) -> str:
    """Return the key of a sample, made of its path below the root without the extension.

    `a/b.jpg` becomes `a_b`. If other characters must be replaced too, or the path is too long,
    eight digits of its sha256 are added to keep different paths apart.
    """
    stem = str(PurePosixPath(location).with_suffix("")).replace("/", "_")
    key = re.sub(r"[^0-9A-Za-z_-]", "_", stem)
    if key != stem or len(key) > MAX_KEY_LENGTH:
        key = digest_key(key, location)
    return key


def digest_key(key: str, location: str, digits: int = 8) -> str:
    """Return the key followed by this many digits of the sha256 of the location."""
    digest = hashlib.sha256(to_bytes(location)).hexdigest()[:digits]
    return f"{key[: MAX_KEY_LENGTH - 1 - digits]}-{digest}"


def make_unique_key(key: str, location: str, used_keys: Container[str]) -> str:
    """Return the key with as many digits of the location's sha256 as make it unique."""
    return next(
        candidate
        for digits in KEY_DIGITS
        if (candidate := digest_key(key, location, digits)) not in used_keys
    )


def compute_walk_key(location: str) -> list[tuple[bool, str]]:
    """Return a sort key that orders files as in a walk: a folder's files before its subfolders."""
    *folders, name = location.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def is_pattern(root: str) -> bool:
    """Return whether ROOT is a glob, and not an existing file or folder with such characters."""
    return any(sign in root for sign in "*?[") and not Store(root).exists("")


def check_split(dataset: str, split: str, splits: Sequence[str]) -> None:
    """Check that a dataset has a split. Raises a UserError that lists the splits."""
    if split not in splits:
        raise UserError(f"{dataset} has no split {split!r}: there are {', '.join(splits)}")


def open_torchvision(
    dataset: str,
    root: str,
    make: Callable[[], T],
    needs: Sequence[str] = (),
    download: bool = False,
    advice: str = "--download fetches it",
) -> T:
    """Open a dataset with torchvision, after checking that its files exist.

    torchvision creates the folders of some datasets before it notices that they are missing, and
    its messages refer to its own arguments. The check leaves a wrong ROOT untouched and names what
    is missing.

    Args:
        make: opens the dataset.
        needs: files and folders below ROOT that the dataset needs.
        download: whether torchvision downloads the dataset, so that nothing need exist.
        advice: where to get the dataset.

    Raises:
        UserError: the dataset is missing, damaged or cannot be downloaded.
    """
    if not root:
        raise UserError(f"--root is missing: the folder that {dataset} is in")
    store = Store(root)
    if not download:
        for name in needs:
            if not store.exists(name):
                raise UserError(build_missing_error(dataset, root, f"{name} is missing", advice))
            if store.is_local and not store.is_folder(name):
                try:
                    check_regular(store.path(name))
                except OSError as error:
                    raise UserError(
                        build_missing_error(dataset, root, f"{name} is {error}", advice)
                    ) from error
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
        elif isinstance(error, RuntimeError):  # torchvision's error for wrong checksums
            reason = f"{', '.join(needs) or 'its files'}: not found or corrupted"
        raise UserError(build_missing_error(dataset, root, reason, advice)) from error


def build_missing_error(dataset: str, root: str, reason: str, advice: str) -> str:
    return f"{root}: no {dataset} as torchvision lays it out ({reason}); {advice}"


def list_class_folders(store: Store, advice: str = "") -> list[str]:
    """Return the sorted names of a store's top-level folders, except hidden and system folders.

    Raises:
        UserError: there is no such folder.
    """
    if not store.exists(""):
        raise UserError(f"{store.url}: no such folder; {advice}".rstrip("; "))
    if not store.is_folder(""):
        raise UserError(f"{store.url}: not a folder; {advice}".rstrip("; "))
    return [n for n in store.folders() if not n.startswith(".") and n not in SYSTEM_FOLDERS]


def list_visible(store: Store, folder: str, below: bool = True) -> Iterator[str]:
    """List the files in a folder and, if `below`, in its subfolders, except hidden files."""
    for location in store.walk(folder) if below else store.names(folder):
        parts = PurePosixPath(location).parts
        if not any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts):
            yield location
