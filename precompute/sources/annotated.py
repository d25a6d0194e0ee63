"""Detection datasets, in which an image has several labels; a separate member stores them."""

import json
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from torchvision import datasets
from torchvision.models.segmentation import FCN_ResNet50_Weights

from precompute.sources.base import (
    Source,
    SourceImage,
    check_split,
    key_of,
    list_visible,
    open_torchvision,
)
from schemas.errors import UserError
from schemas.sample import UNLABELED
from schemas.storage import Store
from schemas.tables import Reject

VOC_YEARS = {"07": ("2007",), "12": ("2012",), "07+12": ("2007", "2012")}
VOC_SETS = ("train", "val", "trainval", "test")
VOC_CLASSES = tuple(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:])
"""The twenty classes in alphabetical order; torchvision's list begins with the background."""

COCO_SETS = {
    "train": "train2017",
    "val": "val2017",
    "test": "test2017",
    "unlabeled": "unlabeled2017",
}


class Voc(Source):
    """Pascal VOC in `root/VOCdevkit/VOC2007|VOC2012/...`.

    Splits are named YEARS-SET: `07+12-trainval`, `12-train`, `07-test`. A set alone means both
    years, except that `test` means 2007, the only year with public annotations of the test set.

    The member `labels.json` holds `{"labels": [...], "difficult": [...]}`: the classes that have an
    object that is not difficult, and the classes whose objects are all difficult.
    """

    classes = VOC_CLASSES

    def __init__(self, root: str, split: str, download: bool):
        years, _, name = split.rpartition("-")
        years = years or ("07" if name == "test" else "07+12")
        if years not in VOC_YEARS or name not in VOC_SETS or (name == "test" and years != "07"):
            raise UserError(
                f"voc has no split {split!r}: it is YEARS-SET, YEARS one of "
                f"{', '.join(VOC_YEARS)}, SET one of train, val, trainval; or 07-test"
            )
        self.entries: list[tuple[str, str]] = []
        self.store = Store(f"{root}/VOCdevkit") if root else Store(".")
        for year in VOC_YEARS[years]:
            make = partial(datasets.VOCDetection, root, year, name, download)
            below = f"VOCdevkit/VOC{year}"
            needs = [f"{below}/ImageSets/Main/{name}.txt", f"{below}/JPEGImages"]
            voc = open_torchvision(f"voc {year}", root, make, needs, download)
            self.entries += [(f"VOC{year}", Path(image).stem) for image in voc.images]

    def images(self) -> Iterator[SourceImage]:
        for folder, name in self.entries:
            yield SourceImage(
                key_of(f"{folder}/{name}.jpg"), f"{folder}/JPEGImages/{name}.jpg", UNLABELED
            )

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)

    def members(self, image: SourceImage) -> dict[str, bytes]:
        folder, _, name = image.location.split("/")
        location = f"{folder}/Annotations/{Path(name).stem}.xml"
        return {"labels.json": parse_voc_labels(self.store.read(location), location)}


def parse_voc_labels(xml: bytes, location: str) -> bytes:
    """Return the classes in a VOC annotation as JSON. Raises ValueError."""
    labels_by_name = {name: label for label, name in enumerate(VOC_CLASSES)}
    plain: set[int] = set()
    difficult: set[int] = set()
    try:
        for entry in ElementTree.fromstring(xml).iter("object"):
            label = labels_by_name[entry.findtext("name", "").strip()]
            (difficult if entry.findtext("difficult", "0").strip() == "1" else plain).add(label)
    except (ElementTree.ParseError, KeyError) as error:
        raise ValueError(f"{location}: not an annotation of VOC ({error})") from error
    content = {"labels": sorted(plain), "difficult": sorted(difficult - plain)}
    return json.dumps(content).encode()


class Coco(Source):
    """COCO 2017 images without labels, in `root/train2017/*.jpg` (or below `root/images`)."""

    def __init__(self, root: str, split: str, download: bool):
        check_split("coco", split, list(COCO_SETS))
        if download:
            raise UserError("COCO is not downloaded by torchvision: get it from cocodataset.org")
        if not root:
            raise UserError("--root is missing: the folder that coco is in")
        folder = COCO_SETS[split]
        parent = f"{root}/images" if Store(root).exists(f"images/{folder}") else root
        self.root, self.split, self.store = root, split, Store(f"{parent}/{folder}")
        if not self.store.exists(""):
            raise UserError(f"{self.store.url}: no such folder; ROOT holds {folder}")

    def images(self) -> Iterator[SourceImage | Reject]:
        for name in list_visible(self.store, ""):
            yield SourceImage(key_of(name), name, UNLABELED)

    def read(self, image: SourceImage) -> bytes:
        return self.store.read(image.location)


class CocoInstances(Coco):
    """COCO 2017 images with annotations from `root/annotations/instances_SET2017.json`.

    The member `instances.json` holds the image's annotations, unchanged.
    """

    def __init__(self, root: str, split: str, download: bool):
        super().__init__(root, split, download)
        self.file = f"{root}/annotations/instances_{COCO_SETS[split]}.json"
        if not Path(self.file).is_file():
            raise UserError(
                f"{self.file}: no such file; DATASET=coco takes the images without instances"
            )

    def images(self) -> Iterator[SourceImage | Reject]:
        needs = [posixpath.relpath(self.file, self.root)]
        advice = "get it from cocodataset.org"
        entries = open_torchvision("coco", self.root, self.read_file, needs, advice=advice)
        for name, annotations in entries:
            instances = json.dumps(annotations, separators=(",", ":"))
            yield SourceImage(key_of(name), name, UNLABELED, instances)

    def read_file(self) -> list[tuple[str, list]]:
        """Set the classes; return the name and the annotations of each image, in order of ids."""
        coco = datasets.CocoDetection(self.store.root, self.file).coco
        self.classes = [category["name"] for category in coco.dataset["categories"]]
        return [
            (posixpath.basename(entry["file_name"]), coco.imgToAnns.get(number, []))
            for number, entry in sorted(coco.imgs.items())
        ]

    def members(self, image: SourceImage) -> dict[str, bytes]:
        return {"instances.json": image.annotation.encode()}
