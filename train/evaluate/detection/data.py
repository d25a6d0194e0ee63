"""Pascal VOC and COCO as pictures with objects, read by torchvision from trees of the true layout.

What cannot be trained on is left out and counted; what nobody could mean is refused with the file's
name: a missing picture, a category that the set does not have, an annotation that cannot be read.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
from torchvision.datasets import CocoDetection, VOCDetection
from torchvision.models.segmentation import FCN_ResNet50_Weights

from schemas import UserError

VOC_CLASSES = tuple(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:])
"""The twenty, in the order of their names; before them torchvision has the background."""


@dataclass(frozen=True)
class Picture:
    """One picture and its objects.

    Attributes:
        number: of the picture in its set, unique.
        path: of its file. size: (height, width).
        boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, inside the picture.
        labels: (n,) int64, from 1.
        ignored: (n,) bool, crowds of COCO and difficult objects of VOC: they count neither way in
            a test.
        trains: (n,) bool: all but crowds, as detectron2 has it.
        masks: n segmentations as COCO has them; empty in VOC.
    """

    number: int
    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    trains: np.ndarray
    masks: list[Any]


@dataclass(frozen=True)
class Pictures:
    """A set of pictures, its classes' names, and how many objects were changed or left out."""

    name: str
    pictures: list[Picture]
    classes: tuple[str, ...]
    masks: bool
    odd: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def digest(self) -> str:
        """sha256 over names, boxes and labels; of the pixels only their number."""
        content = hashlib.sha256(repr(self.classes).encode())
        for one in self.pictures:
            content.update(f"{one.path.name} {one.size}".encode())
            for values in (one.boxes, one.labels, one.trains):
                content.update(values.tobytes())
        return content.hexdigest()

    def trainable(self) -> "list[Picture]":
        """Pictures with an object to train on."""
        return [p for p in self.pictures if p.trains.any()]


def clipped(
    box: tuple[float, float, float, float], size: tuple[int, int], odd: Counter
) -> tuple[float, float, float, float] | None:
    """The part of a box that lies in the picture, None where that is nothing; counts either."""
    height, width = size
    x0, y0, x1, y1 = box
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    if inside[2] - inside[0] <= 0 or inside[3] - inside[1] <= 0:
        odd["boxes without area left out"] += 1
        return None
    if inside != box:
        odd["boxes cut to their picture"] += 1
    return inside


def picture(
    number: int, path: Path, size: tuple[int, int], objects: list[tuple[Any, ...]], odd: Counter
) -> Picture:
    """Objects as (box, label, ignored, trains, mask)."""
    if not path.is_file():
        raise UserError(f"{path}: no such picture, but it is annotated")
    kept = []
    for box, *others in objects:
        inside = clipped(box, size, odd)
        if inside is not None:
            kept.append((inside, *others))
    return Picture(
        number,
        path,
        size,
        np.array([box for box, *_ in kept], np.float32).reshape(-1, 4),
        np.array([label for _, label, *_ in kept], np.int64),
        np.array([ignored for _, _, ignored, *_ in kept], bool),
        np.array([trains for *_, trains, _ in kept], bool),
        [mask for *_, mask in kept if mask is not None],
    )


def voc(root: str, years: tuple[str, ...], image_set: str) -> Pictures:
    """`root/VOCdevkit/VOC2007/...`; its pixels count from 1.

    Raises:
        UserError: the tree or one of its files is not as it should be.
    """
    odd: Counter = Counter()
    found: list[Picture] = []
    for year in years:
        try:
            source = VOCDetection(root, year, image_set)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root}: no VOCdevkit/VOC{year} with a set {image_set}") from error
        for image, annotation in zip(source.images, source.annotations, strict=True):
            found.append(voc_picture(len(found), Path(image), Path(annotation), source, odd))
    return Pictures(f"voc {'+'.join(years)} {image_set}", found, VOC_CLASSES, False, odd)


def voc_picture(
    number: int, image: Path, annotation: Path, source: VOCDetection, odd: Counter
) -> Picture:
    from xml.etree.ElementTree import parse

    try:
        tree = source.parse_voc_xml(parse(annotation).getroot())["annotation"]
        size = int(tree["size"]["height"]), int(tree["size"]["width"])
        objects = []
        for item in tree.get("object", []):
            if item["name"] not in VOC_CLASSES:
                raise UserError(f"{annotation}: unknown class {item['name']!r}")
            x0, y0, x1, y1 = (float(item["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax"))
            label = VOC_CLASSES.index(item["name"]) + 1
            difficult = item.get("difficult", "0") == "1"
            objects.append(((x0 - 1, y0 - 1, x1, y1), label, difficult, True, None))
    except (ParseError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{annotation}: cannot be read ({type(error).__name__} {error})") from error
    return picture(number, image, size, objects, odd)


def coco(root: str, split: str, annotations: str | None = None) -> Pictures:
    """`root/annotations/instances_SPLIT.json` with pictures in `root/SPLIT` or `root/images/SPLIT`.

    Args:
        annotations: another annotation file.

    Raises:
        UserError: the tree or one of its files is not as it should be.
    """
    file = Path(annotations or Path(root) / "annotations" / f"instances_{split}.json")
    folders = [Path(root) / split, Path(root) / "images" / split]
    folder = next((f for f in folders if f.is_dir()), None)
    if not file.is_file():
        raise UserError(f"no {file}, the annotations of {split}")
    if folder is None:
        raise UserError(f"no folder {folders[0]} or {folders[1]} with the pictures of {split}")
    try:
        source = CocoDetection(str(folder), str(file)).coco
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: not a COCO annotation file ({error})") from error
    categories = sorted(source.cats)
    label_of = {category: place for place, category in enumerate(categories, 1)}
    odd: Counter = Counter()
    found = []
    masks = any("segmentation" in one for one in source.anns.values())
    for number in sorted(source.imgs):
        info = source.imgs[number]
        objects = []
        for one in source.loadAnns(source.getAnnIds(imgIds=number)):
            if one["category_id"] not in label_of:
                raise UserError(
                    f"{file}: annotation {one['id']} is of category {one['category_id']}, "
                    "which the file does not list"
                )
            x, y, width, height = one["bbox"]
            crowd = bool(one.get("iscrowd", 0))
            label = label_of[one["category_id"]]
            box = x, y, x + width, y + height
            objects.append((box, label, crowd, not crowd, one.get("segmentation")))
        path = folder / info["file_name"]
        found.append(picture(number, path, (info["height"], info["width"]), objects, odd))
    classes = tuple(source.cats[category]["name"] for category in categories)
    return Pictures(f"coco {split}", found, classes, masks, odd)
