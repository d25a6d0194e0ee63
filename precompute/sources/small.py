"""Sources of small labeled datasets that torchvision downloads and parses."""

import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from precompute.sources.base import (
    Source,
    SourceImage,
    check_split,
    key_of,
    list_class_folders,
    list_visible,
    open_torchvision,
)
from schemas.errors import UserError
from schemas.sample import UNLABELED
from schemas.storage import Store
from schemas.tables import Reject

CALTECH_TRAIN = 30
"""Number of training images per class, as in the usual protocol; choosing them by a hash is our
choice (docs/method.md)."""

CALTECH_BACKGROUND = "BACKGROUND_Google"
CALTECH_IMAGE = re.compile(r"image_\d{4}\.jpg")

STL10_SIDE = 96


class Caltech101(Source):
    """Caltech 101 without the background class.

    Reads `root/caltech101/101_ObjectCategories/CLASS/image_0001.jpg`. The dataset has no official
    split: `train` has 30 images per class, chosen by a hash of their names, `test` has the
    remaining ones, and `all` has both.
    """

    def __init__(self, root: str, split: str, download: bool):
        check_split("caltech101", split, ("train", "test", "all"))
        # torchvision is used only to download: it would list every file as an image, and system
        # folders as classes
        make = partial(datasets.Caltech101, root, download=True) if download else dict
        open_torchvision("caltech101", root, make, ["caltech101/101_ObjectCategories"], download)
        self.split = split
        self.store = Store(f"{root}/caltech101/101_ObjectCategories")
        self.classes = [
            name for name in list_class_folders(self.store) if name != CALTECH_BACKGROUND
        ]

    def images(self) -> Iterator[SourceImage | Reject]:
        for label, kind in enumerate(self.classes):
            names = []
            for name in list_visible(self.store, kind):
                if CALTECH_IMAGE.fullmatch(posixpath.basename(name)):
                    names.append(name)
                else:
                    yield Reject(name, "no-image", "images are named image_0001.jpg ...")
            order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
            train, test = order[:CALTECH_TRAIN], order[CALTECH_TRAIN:]
            chosen = {"train": train, "test": test, "all": names}[self.split]
            yield from (SourceImage(key_of(name), name, label) for name in sorted(chosen))

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class Flowers102(Source):
    """Flowers 102: `root/flowers-102/jpg/image_00001.jpg`, with labels and splits in .mat files."""

    def __init__(self, root: str, split: str, download: bool):
        check_split("flowers102", split, ("train", "val", "test"))
        dataset = open_torchvision(
            "flowers102",
            root,
            lambda: datasets.Flowers102(root, split, download=download),
            [f"flowers-102/{name}" for name in ("jpg", "imagelabels.mat", "setid.mat")],
            download,
        )
        self.classes = list(dataset.classes)
        self.store = Store(f"{root}/flowers-102/jpg")
        # torchvision has no public list of the files
        self.entries = [
            (Path(file).name, int(label))
            for file, label in zip(dataset._image_files, dataset._labels, strict=True)
        ]

    def images(self) -> Iterator[SourceImage]:
        for name, label in self.entries:
            yield SourceImage(key_of(name), name, label)

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class Arrays(Source):
    """Base class of sources that store pixels in large files; images are read as lossless PNGs."""

    pixels: Any  # index -> (height, width, 3) uint8; never pickled

    def read(self, image: SourceImage) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.pixels[int(image.location)])).save(buffer, "PNG")
        return buffer.getvalue()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pixels"}


class Stl10(Arrays):
    """STL-10: `root/stl10_binary/*_X.bin`, 96 x 96 pixels; splits train, test, unlabeled.

    The files are memory-mapped, because the unlabeled images alone take 2.8 GB.
    """

    def __init__(self, root: str, split: str, download: bool):
        check_split("stl10", split, ("train", "test", "unlabeled"))
        stl10 = datasets.STL10
        if download and not Path(root, stl10.base_folder).exists():
            open_torchvision(
                "stl10",
                root,
                lambda: download_and_extract_archive(
                    stl10.url, root, filename=stl10.filename, md5=stl10.tgz_md5
                ),
            )
        self.folder = Path(root, stl10.base_folder)
        self.split = split
        needs = [f"{split}_X.bin"]
        if split != "unlabeled":
            needs += [f"{split}_y.bin", stl10.class_names_file]
        needs = [f"{stl10.base_folder}/{name}" for name in needs]
        self.count = len(open_torchvision("stl10", root, lambda: self.pixels, needs))
        if split == "unlabeled":
            return
        self.classes = (self.folder / stl10.class_names_file).read_text().split()
        self.labels = np.fromfile(self.folder / f"{split}_y.bin", np.uint8).astype(int) - 1
        if len(self.labels) != self.count:
            raise UserError(f"{self.folder}: {self.count} images but {len(self.labels)} labels")

    @cached_property
    def pixels(self) -> np.ndarray:
        """Pixels of all images: (N, 96, 96, 3) uint8; the file stores them column by column."""
        flat = np.memmap(self.folder / f"{self.split}_X.bin", np.uint8, "r")
        return flat.reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)

    def images(self) -> Iterator[SourceImage]:
        for index in range(self.count):
            label = UNLABELED if self.split == "unlabeled" else int(self.labels[index])
            yield SourceImage(f"{self.split}-{index:06d}", str(index), label)


class Cifar10(Arrays):
    """CIFAR-10: `root/cifar-10-batches-py`, 32 x 32 pixels; splits train and test."""

    def __init__(self, root: str, split: str, download: bool):
        check_split("cifar10", split, ("train", "test"))
        self.root, self.split = os.path.abspath(root) if root else "", split
        batches = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
        dataset = open_torchvision(
            "cifar10",
            root,
            lambda: datasets.CIFAR10(root, split == "train", download=download),
            [f"cifar-10-batches-py/{name}" for name in (*batches, "batches.meta")],
            download,
        )
        self.classes, self.labels = list(dataset.classes), list(dataset.targets)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Pixels of all images: (N, 32, 32, 3) uint8."""
        return datasets.CIFAR10(self.root, self.split == "train").data

    def images(self) -> Iterator[SourceImage]:
        for index, label in enumerate(self.labels):
            yield SourceImage(f"{self.split}-{index:05d}", str(index), int(label))
