"""Pascal VOC from a tree of the true layout, as torchvision lists it."""

import math
from collections import Counter
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, parse

from torchvision.datasets import VOCDetection
from torchvision.models.segmentation import FCN_ResNet50_Weights

from schemas import UserError
from train.evaluate.detection.data import Object, Picture, Pictures, picture

VOC_CLASSES = tuple(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:])
"""The twenty, in the order of their names; before them torchvision has the background."""


def read_voc(root: str, years: tuple[str, ...], image_set: str) -> Pictures:
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
        repeated = [name for name, times in Counter(source.images).items() if times > 1]
        if repeated:
            raise UserError(f"{repeated[0]}: more than once in the set {image_set} of {year}")
        for image, annotation in zip(source.images, source.annotations, strict=True):
            found.append(voc_picture(len(found), Path(image), Path(annotation), odd))
    return Pictures(f"voc {'+'.join(years)} {image_set}", found, VOC_CLASSES, False, odd)


def voc_picture(number: int, image: Path, annotation: Path, odd: Counter) -> Picture:
    try:
        tree = parse(annotation).getroot()
        size = int(text(tree, "size/height")), int(text(tree, "size/width"))
        if min(size) < 1:
            raise ValueError(f"a size of {size[0]} x {size[1]} pixels")
        objects = [voc_object(item, odd) for item in tree.findall("object")]
    except OSError as error:
        raise UserError(f"{annotation}: {error.strerror}") from error
    except (ParseError, ValueError) as error:
        raise UserError(f"{annotation}: {error}") from error
    return picture(number, image, size, objects, odd)


def voc_object(item: Element, odd: Counter) -> Object:
    """Raises ValueError."""
    name = text(item, "name")
    if name not in VOC_CLASSES:
        raise ValueError(f"unknown class {name!r}")
    x0, y0, x1, y1 = (float(text(item, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(f"a box of {x0}, {y0}, {x1}, {y1}")
    difficult = item.findtext("difficult")
    if difficult is None:
        odd["objects that do not say whether they are difficult, taken for easy ones"] += 1
    elif difficult.strip() not in ("0", "1"):
        raise ValueError(f"difficult is {difficult!r}, neither 0 nor 1")
    ignored = difficult is not None and difficult.strip() == "1"
    box = x0 - 1, y0 - 1, x1, y1
    return Object(box, VOC_CLASSES.index(name) + 1, ignored=ignored, trains=True)


def text(element: Element, path: str) -> str:
    """What an element below this one says. Raises ValueError where there is none."""
    found = element.findtext(path)
    if found is None:
        raise ValueError(f"{element.tag} without {path}")
    return found.strip()
