"""Sources of ImageNet and ImageNet-100, in the layouts of torchvision and Kaggle."""

import csv
import posixpath
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import resources

from precompute.sources.base import (
    WHOLE,
    SourceImage,
    check_split,
    key_of,
    list_class_folders,
    list_visible,
    open_torchvision,
)
from precompute.sources.trees import ClassFolders
from schemas.counts import join_first
from schemas.errors import UserError
from schemas.storage import Store
from schemas.tables import Reject

WNID = re.compile(r"n\d{8}")
CLASSES = 1000
KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
"""Path to `train` and `val` in Kaggle's archive, relative to each of the folders above them."""
KAGGLE_LABELS = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
SHOWN = 5


class ImageNet(ClassFolders):
    """ILSVRC 2012 in torchvision's layout: `root/train/WNID/*.JPEG` and `root/val/WNID/*.JPEG`.

    If the folders are missing but the archives exist, torchvision unpacks them. Kaggle's layout is
    read too: `root/ILSVRC/Data/CLS-LOC/train` and `val`, of which `val` has no class folders; its
    labels are in `LOC_val_solution.csv` next to ILSVRC. Classes are numbered in the order of their
    WordNet ids, as is usual.
    """

    def __init__(self, root: str, split: str, download: bool):
        store = find_split_folder(root, split, download)
        folders = list_class_folders(store)
        self.flat = {} if any(map(WNID.fullmatch, folders)) else read_kaggle_labels(root, store)
        wnids = sorted({*self.flat.values()} or filter(WNID.fullmatch, folders))
        self.other_folders = [name for name in folders if name not in wnids]
        super().__init__(store, self.choose(wnids, store))

    def choose(self, wnids: list[str], store: Store) -> list[str]:
        """Return the classes in the order of their labels. Raises UserError."""
        if len(wnids) != CLASSES:
            raise UserError(
                f"{store.url}: {len(wnids)} class folders named by WordNet id, not {CLASSES}: "
                f"labels would not be ImageNet's{compare_splits(store, wnids)}; DATASET=folder "
                "takes any"
            )
        return wnids

    def parts(self) -> Sequence[str]:
        return [WHOLE] if self.flat else [*self.folders, WHOLE]

    def list_part(self, part: str) -> Iterator[SourceImage | Reject]:
        if part != WHOLE:
            yield from super().list_part(part)
        elif self.flat:
            yield from self.list_flat()
        else:
            for name in self.other_folders:
                yield Reject(name, "no-class", "a folder that is named by no WordNet id")

    def list_flat(self) -> Iterator[SourceImage | Reject]:
        """List images without class folders, as in `val` of Kaggle's layout."""
        for location in list_visible(self.store, ""):
            wnid = self.flat.get(posixpath.splitext(posixpath.basename(location))[0])
            if wnid is None:
                yield Reject(location, "no-class", f"{KAGGLE_LABELS} does not list it")
            elif wnid in self.labels:
                yield SourceImage(key_of(location), location, self.labels[wnid])


class ImageNet100(ImageNet):
    """ImageNet-100: 100 classes of ImageNet (from Tian et al., "Contrastive Multiview Coding").

    Reads an ImageNet tree; classes are numbered in the order of the list.
    """

    def choose(self, wnids: list[str], store: Store) -> list[str]:
        file = resources.files("precompute.sources").joinpath("imagenet100.txt")
        classes = file.read_text().split()
        if missing := [name for name in classes if name not in wnids]:
            raise UserError(
                f"{store.url}: lacks {len(missing)} of the 100 class folders: "
                f"{join_first(missing, SHOWN)}"
            )
        self.other_folders = []
        return classes


def find_split_folder(root: str, split: str, download: bool) -> Store:
    """Find the folder of a split, unpacking torchvision's archives if needed. Raises UserError."""
    check_split("imagenet", split, ("train", "val"))
    if download:
        raise UserError(
            "ImageNet cannot be downloaded: register at image-net.org, put the archives into ROOT, "
            "and leave --download out"
        )
    if not root:
        raise UserError("--root is missing: the folder that ImageNet is in")
    places = [root.rstrip("/"), *(f"{root.rstrip('/')}/{below}" for below in KAGGLE)]
    stores = [Store(f"{place}/{split}") for place in places]
    store = next((store for store in stores if store.exists("")), stores[0])
    archive = f"ILSVRC2012_img_{split}.tar"
    if not store.exists("") and Store(root).exists(archive):
        from torchvision import datasets  # imported here, because the import takes seconds

        print(f"unpacking the archives in {root}", flush=True)
        make = partial(datasets.ImageNet, root, split)
        open_torchvision(
            "imagenet", root, make, [DEVKIT, archive], advice="get it at image-net.org"
        )
    if not store.exists(""):
        raise UserError(
            f"{root}: no ImageNet in it: looked for {', '.join(f'{s.url}/' for s in stores)} and "
            f"{archive}"
        )
    if not list_class_folders(store) and (
        tars := [n for n in store.names("") if n.endswith(".tar")]
    ):
        raise UserError(
            f"{store.url}: holds {len(tars)} tars that are not unpacked ({tars[0]} ...); unpack "
            f"each into a folder of its name: mkdir {tars[0][:-4]} && tar xf {tars[0]} -C "
            f"{tars[0][:-4]}"
        )
    return store


def read_kaggle_labels(root: str, store: Store) -> dict[str, str]:
    """Return the WordNet id of each image of a flat folder, by file name without the extension.

    Raises:
        UserError: there are images without class folders, and no list of their classes.
    """
    above = [store.url]
    while len(above) < 6 and "/" in above[-1].rstrip("/"):
        above.append(posixpath.dirname(above[-1]))
    folders = dict.fromkeys([root.rstrip("/"), *above[1:]])
    for folder in map(Store, filter(None, folders)):
        if folder.exists(KAGGLE_LABELS):
            lines = folder.read(KAGGLE_LABELS).decode("utf-8-sig", "replace").splitlines()
            rows = csv.reader(lines[1:])  # ImageId,PredictionString: "n03995372 85 1 499 272"
            return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].split()}
    if not any(list_visible(store, "")):
        return {}
    raise UserError(
        f"{store.url}: its images are not in class folders (n01440764 ...); looked for "
        f"{KAGGLE_LABELS} in {', '.join(folders)}"
    )


def compare_splits(store: Store, wnids: list[str]) -> str:
    """Describe the classes that one of the two splits has and the other lacks."""
    other_split = {"train": "val", "val": "train"}[posixpath.basename(store.url)]
    other_store = Store(f"{posixpath.dirname(store.url)}/{other_split}")
    if not other_store.exists(""):
        return ""
    other_wnids = set(filter(WNID.fullmatch, list_class_folders(other_store)))
    missing, extra = sorted(other_wnids - set(wnids)), sorted(set(wnids) - other_wnids)
    lacks = (
        f"; {other_split} also has {join_first(missing, SHOWN)}" if missing and other_wnids else ""
    )
    return lacks + (
        f"; {other_split} lacks {join_first(extra, SHOWN)}" if extra and other_wnids else ""
    )
