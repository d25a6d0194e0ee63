"""`DATASET=` names -> listed source images.

A source lists its images without reading them, and reads one when asked to. A new source is one
class and one line in `SOURCES`.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from precompute import demo
from schemas.errors import UserError
from schemas.sample import MAX_KEY_LENGTH, UNLABELLED
from schemas.storage import Store
from schemas.tables import Reject


class SourceImage(NamedTuple):
    """`key` names the sample, `location` finds the image in its source, `label` is its class."""

    key: str
    location: str
    label: int


class Source(Protocol):
    """Images that are somewhere. Pickled to every worker, so it holds no image and no open file."""

    @property
    def classes(self) -> Sequence[str]:
        """Names by label; empty when nothing is labelled."""
        ...

    def images(self) -> Iterator[SourceImage | Reject]:
        """Lists every input once, in a fixed order; what cannot be an image comes as a reject."""
        ...

    def read(self, image: SourceImage) -> bytes:
        """The encoded image. Raises OSError."""
        ...


class FolderSource:
    """An ImageFolder tree: `root/CLASS/**/image`, labels by the sorted class folder names.

    A root without class folders is a set of unlabelled images. Every file that is not hidden is
    listed; whether it is an image shows when it is read.

    Args:
        root: a plain path or any fsspec URL.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, root: str, split: str):
        del split  # a tree is one split; the name goes into the card only
        if not root:
            raise UserError("--root is missing: a folder with one folder a class")
        self.store = Store(root)
        fs, path = self.store.fs, self.store.root
        if not fs.exists(path):
            raise UserError(f"{root}: no such folder; ROOT is a folder with one folder a class")
        if not fs.isdir(path):
            raise UserError(f"{root}: not a folder; ROOT is a folder with one folder a class")
        folders = (
            posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False) if fs.isdir(p)
        )
        self.classes = sorted(name for name in folders if not name.startswith("."))

    def images(self) -> Iterator[SourceImage | Reject]:
        labels = {name: label for label, name in enumerate(self.classes)}
        for location in self.store.files():
            parts = PurePosixPath(location).parts
            if any(part.startswith(".") for part in parts):
                continue
            if labels and len(parts) == 1:
                yield Reject(location, "no-class", "beside the class folders; move it into one")
            else:
                label = labels[parts[0]] if labels else UNLABELLED
                yield SourceImage(key_of(location), location, label)

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class DemoSource:
    """Generated scenes, see `demo.py`; `root` is not used."""

    classes = demo.CLASSES

    def __init__(self, root: str, split: str):
        del root
        self.split = split

    def images(self) -> Iterator[SourceImage]:
        for index in range(demo.SCENES):
            yield SourceImage(f"scene-{index:05d}", str(index), demo.label_of(index))

    def read(self, image: SourceImage) -> bytes:
        return demo.to_jpeg(demo.scene(int(image.location), self.split).image)


SOURCES: dict[str, Callable[[str, str], Source]] = {"demo": DemoSource, "folder": FolderSource}


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


def list_images(source: Source) -> tuple[list[SourceImage], list[Reject]]:
    """All images of a source with keys of their own, and what cannot be one of them."""
    images: dict[str, SourceImage] = {}
    rejects: list[Reject] = []
    for entry in source.images():
        if isinstance(entry, Reject):
            rejects.append(entry)
        elif (first := images.setdefault(entry.key, entry)) is not entry:
            detail = f"its key {entry.key} is taken by {first.location}; rename one of the two"
            rejects.append(Reject(entry.location, "key-collision", detail))
    return list(images.values()), rejects
