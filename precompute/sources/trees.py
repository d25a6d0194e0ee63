"""Sources that are folders of image files."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import PurePosixPath

from precompute.sources.base import Source, SourceImage, check_split, key_of, opened
from schemas.errors import UserError
from schemas.sample import UNLABELLED
from schemas.storage import Store
from schemas.tables import Reject

SHOWN = 5
WNID = re.compile(r"n\d{8}")
IMAGENET_CLASSES = 1000
IMAGENETTE_FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")


class ClassFolders(Source):
    """`root/CLASS/**/image`, in the order of the given classes.

    Every file that is not hidden is listed; whether it is an image shows when it is read.
    """

    def __init__(self, store: Store, classes: Sequence[str]):
        self.store = store
        self.classes = list(classes)

    def images(self) -> Iterator[SourceImage | Reject]:
        for label, name in enumerate(self.classes):
            for location in visible(self.store, name):
                yield SourceImage(key_of(location), location, label)

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class Folder(ClassFolders):
    """An ImageFolder tree: labels by the sorted class folder names.

    A root without class folders is a set of unlabelled images.

    Args:
        root: a plain path or any fsspec URL.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, root: str, split: str, download: bool):
        del split, download  # a tree is one split; the name goes into the card only
        if not root:
            raise UserError("--root is missing: a folder with one folder a class")
        store = Store(root)
        super().__init__(store, folders_in(store, "ROOT is a folder with one folder a class"))

    def images(self) -> Iterator[SourceImage | Reject]:
        yield from super().images()
        for location in visible(self.store, "", below=not self.classes):
            if self.classes:
                yield Reject(location, "no-class", "beside the class folders; move it into one")
            else:
                yield SourceImage(key_of(location), location, UNLABELLED)


class ImageNet(ClassFolders):
    """ILSVRC 2012 as torchvision lays it out: `root/train/WNID/*.JPEG` and `root/val/WNID/*.JPEG`.

    Where the folders are missing but the archives are there, torchvision unpacks them. Labels by
    the sorted WordNet ids, as everywhere.
    """

    def __init__(self, root: str, split: str, download: bool):
        store = imagenet_split(root, split, download)
        classes = [name for name in folders_in(store, "") if WNID.fullmatch(name)]
        if len(classes) != IMAGENET_CLASSES:
            raise UserError(
                f"{store.url}: {len(classes)} class folders named by WordNet id, not "
                f"{IMAGENET_CLASSES}: labels would not be ImageNet's; DATASET=folder takes any"
            )
        super().__init__(store, classes)


class ImageNet100(ClassFolders):
    """The 100 classes of ImageNet-100 (the list of Tian et al., "Contrastive Multiview Coding").

    Out of an ImageNet tree, labels in the order of the list.
    """

    def __init__(self, root: str, split: str, download: bool):
        store = imagenet_split(root, split, download)
        listed = resources.files("precompute.sources").joinpath("imagenet100.txt").read_text()
        classes = listed.split()
        there = set(folders_in(store, ""))
        if missing := [name for name in classes if name not in there]:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise UserError(
                f"{store.url}: lacks {len(missing)} of the 100 class folders: "
                f"{', '.join(missing[:SHOWN])}{more}"
            )
        super().__init__(store, classes)


class Imagenette(ClassFolders):
    """Imagenette v2 of any size, `root/imagenette2[-320|-160]/train|val/WNID/*.JPEG`.

    Downloads the full size. A root that holds several sizes is refused: name one of them.
    """

    def __init__(self, root: str, split: str, download: bool):
        check_split("imagenette", split, ("train", "val"))
        if download:
            from torchvision import datasets  # seconds to import; only where it is used

            opened("imagenette", root, lambda: datasets.Imagenette(root, split, download=True))
        if not root:
            raise UserError("--root is missing: the folder that imagenette is in")
        names = [name for name in IMAGENETTE_FOLDERS if Store(root).exists(name)]
        if len(names) > 1:
            raise UserError(f"{root}: holds {' and '.join(names)}; give one of them as ROOT")
        store = Store("/".join([root.rstrip("/"), *names, split]))
        super().__init__(store, folders_in(store, "--download fetches imagenette"))


def imagenet_split(root: str, split: str, download: bool) -> Store:
    check_split("imagenet", split, ("train", "val"))
    if download:
        raise UserError(
            "ImageNet cannot be downloaded: register at image-net.org, put the archives into ROOT, "
            "and leave --download out"
        )
    if not root:
        raise UserError("--root is missing: the folder that ImageNet is in")
    here, folder = Store(root), Store(f"{root.rstrip('/')}/{split}")
    if not folder.exists("") and here.exists(f"ILSVRC2012_img_{split}.tar"):
        from torchvision import datasets

        print(f"unpacking the archives in {root}", flush=True)
        opened("imagenet", root, lambda: datasets.ImageNet(root, split))
    return folder


class Files(Source):
    """Unlabelled images by a glob (`photos/**/*.jpg`) or a text file with one location a line.

    Lines are paths relative to the text file's folder, absolute paths, or fsspec URLs.
    """

    def __init__(self, root: str, split: str, download: bool):
        del split, download
        if not root:
            raise UserError("--root is missing: a glob, or a text file with one image a line")
        self.root = root
        self.is_glob = any(sign in root for sign in "*?[")
        fixed = re.split(r"[*?\[]", root, maxsplit=1)[0]
        self.store = Store(posixpath.dirname(fixed) or ".")
        name = posixpath.basename(root)
        if not self.is_glob and (not self.store.exists(name) or self.store.is_folder(name)):
            raise UserError(
                f"{root}: no such text file; ROOT is a glob or a list of images; DATASET=folder "
                "takes a folder"
            )

    def images(self) -> Iterator[SourceImage | Reject]:
        for location in self.locations():
            yield SourceImage(key_of(location), location, UNLABELLED)

    def locations(self) -> Iterator[str]:
        if self.is_glob:
            yield from self.store.glob(self.root)
            return
        with self.store.open(posixpath.basename(self.root)) as lines:
            for line in lines:
                if location := line.decode("utf-8", "surrogateescape").strip():
                    yield location

    def read(self, image: SourceImage) -> bytes:
        if "://" in image.location:
            return Store(posixpath.dirname(image.location)).read(posixpath.basename(image.location))
        return self.store.read(image.location)  # an absolute path stays itself when it is joined


def folders_in(store: Store, advice: str) -> list[str]:
    """Names of the folders directly in a folder, sorted, but hidden ones. Raises UserError."""
    if not store.exists(""):
        raise UserError(f"{store.url}: no such folder; {advice}".rstrip("; "))
    if not store.is_folder(""):
        raise UserError(f"{store.url}: not a folder; {advice}".rstrip("; "))
    return [name for name in store.folders() if not name.startswith(".")]


def visible(store: Store, folder: str, below: bool = True) -> Iterator[str]:
    """Files in a folder, and below it, none of them hidden."""
    for location in store.walk(folder) if below else store.sizes(folder):
        if not any(part.startswith(".") for part in PurePosixPath(location).parts):
            yield location
