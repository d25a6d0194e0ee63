"""Sources that read folders or lists of image files."""

import codecs
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from precompute.sources.base import (
    REMOTE_READERS,
    WHOLE,
    PartedSource,
    Source,
    SourceImage,
    check_split,
    is_pattern,
    key_of,
    list_class_folders,
    list_visible,
    open_torchvision,
)
from schemas.errors import UserError
from schemas.sample import UNLABELED
from schemas.storage import Store
from schemas.tables import Reject

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
IMAGENETTE_FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")


class ClassFolders(PartedSource):
    """Images in one folder per class: `root/CLASS/**/image`, in the order of the given classes.

    Every file that is not hidden is listed; one that is not an image is rejected when it is read.
    """

    def __init__(self, store: Store, folders: Sequence[str]):
        self.store = store
        self.folders = list(folders)
        self.classes = list(folders)
        self.labels = {name: label for label, name in enumerate(folders)}

    def parts(self) -> Sequence[str]:
        return self.folders

    def list_part(self, part: str) -> Iterator[SourceImage | Reject]:
        label = self.labels[part]
        for location in list_visible(self.store, part):
            yield SourceImage(key_of(location), location, label)

    def linked_folders(self) -> Sequence[str]:
        return self.store.followed

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class Folder(ClassFolders):
    """A tree in the layout of ImageFolder, with classes in the order of the sorted folder names.

    If the root has no class folders, its images are unlabeled.

    Args:
        root: a plain path or any fsspec URL.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, root: str, split: str, download: bool):
        del split, download  # a tree is a single split; the split's name is only for the card
        if not root:
            raise UserError("--root is missing: a folder with one folder per class")
        store = Store(root)
        folders = list_class_folders(store, "ROOT is a folder with one folder per class")
        refuse_splits(store, folders)
        super().__init__(store, folders)

    def parts(self) -> Sequence[str]:
        return [*self.folders, WHOLE]

    def list_part(self, part: str) -> Iterator[SourceImage | Reject]:
        if part != WHOLE:
            yield from super().list_part(part)
            return
        for location in list_visible(self.store, "", below=not self.folders):
            if self.folders:
                yield Reject(location, "no-class", "next to the class folders; move it into one")
            else:
                yield SourceImage(key_of(location), location, UNLABELED)


class Imagenette(ClassFolders):
    """Imagenette v2 of any size, in `root/imagenette2[-320|-160]/train|val/WNID/*.JPEG`.

    A download fetches the full size. A root with several sizes is refused; ROOT must then be the
    folder of one of them.
    """

    def __init__(self, root: str, split: str, download: bool):
        check_split("imagenette", split, ("train", "val"))
        if download:
            from torchvision import datasets  # imported here, because the import takes seconds

            open_torchvision(
                "imagenette", root, lambda: datasets.Imagenette(root, split, download=True)
            )
        if not root:
            raise UserError("--root is missing: the folder that imagenette is in")
        names = [name for name in IMAGENETTE_FOLDERS if Store(root).exists(name)]
        if len(names) > 1:
            raise UserError(f"{root}: holds {' and '.join(names)}; give one of them as ROOT")
        store = Store("/".join([root.rstrip("/"), *names, split]))
        super().__init__(store, list_class_folders(store, "--download fetches imagenette"))


def refuse_splits(store: Store, folders: list[str]) -> None:
    """Refuse a ROOT whose folders are splits of a dataset, which would be treated as classes."""
    below = ""
    if len(folders) == 1:
        below = f"{folders[0]}/"
        folders = [name for name in sorted(SPLITS) if store.is_folder(below + name)]
    if len(folders) > 1 and SPLITS.issuperset(map(str.lower, folders)):
        raise UserError(
            f"{store.url}: holds {' and '.join(below + name for name in folders)}, which are "
            f"splits, not classes; give one of them as ROOT: {store.url}/{below}{folders[0]}"
        )


class Files(Source):
    """Unlabeled images, given by a glob (`photos/**/*.jpg`) or a text file.

    The text file has one location per line: a path relative to the text file's folder, an absolute
    path, or an fsspec URL.
    """

    def __init__(self, root: str, split: str, download: bool):
        del split, download
        if not root:
            raise UserError("--root is missing: a glob, or a text file with one image per line")
        self.root = root
        self.is_glob = is_pattern(root)
        fixed = re.split(r"[*?\[]", root, maxsplit=1)[0] if self.is_glob else root
        self.store = Store(posixpath.dirname(fixed) or ".")
        name = posixpath.basename(root)
        if not self.is_glob and (not self.store.exists(name) or self.store.is_folder(name)):
            raise UserError(
                f"{root}: no such text file; ROOT is a glob or a list of images; DATASET=folder "
                "takes a folder"
            )

    def images(self) -> Iterator[SourceImage | Reject]:
        for location in self.locations():
            if "://" in location and not location.startswith("file://"):
                self.readers = REMOTE_READERS  # the list itself may be a local file
            if PurePosixPath(location).name:
                yield SourceImage(key_of(location), location, UNLABELED)
            else:
                detail = "a line of the list that names no file; correct or remove it"
                yield Reject(location, "not-a-file", detail)

    def locations(self) -> Iterator[str]:
        if self.is_glob:
            yield from self.store.glob(self.root)
            return
        with self.store.open(posixpath.basename(self.root)) as lines:
            for number, line in enumerate(lines):
                # editors on Windows begin a file with this mark
                name = line if number else line.removeprefix(codecs.BOM_UTF8)
                if location := name.decode("utf-8", "surrogateescape").strip():
                    yield location

    def read(self, image: SourceImage) -> bytes:
        if "://" in image.location:
            return Store(posixpath.dirname(image.location)).read(posixpath.basename(image.location))
        return self.store.read(image.location)  # joining keeps an absolute path unchanged
