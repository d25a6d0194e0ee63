"""Read Pascal VOC from a tree of its original layout, listed by torchvision."""

import math
from collections import Counter
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, parse

from torchvision.datasets import VOCDetection
from torchvision.models.segmentation import FCN_ResNet50_Weights

from schemas import UserError
from train.evaluate.detection.data import (
    AnnotatedImage,
    DetectionDataset,
    Object,
    build_annotated_image,
)

VOC_CLASSES = tuple(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"][1:])
"""The twenty classes in alphabetical order; torchvision's list begins with the background."""


def read_voc(root: str, years: tuple[str, ...], image_set: str) -> DetectionDataset:
    """Read an image set of `root/VOCdevkit/VOC2007` and other years; VOC counts pixels from 1.

    Raises:
        UserError: a file is missing or invalid.
    """
    odd: Counter = Counter()
    images: list[AnnotatedImage] = []
    for year in years:
        try:
            source = VOCDetection(root, year, image_set)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{root}: no VOCdevkit/VOC{year} with a set {image_set}") from error
        repeated = [name for name, times in Counter(source.images).items() if times > 1]
        if repeated:
            raise UserError(f"{repeated[0]}: more than once in the set {image_set} of {year}")
        for image, annotation in zip(source.images, source.annotations, strict=True):
            images.append(parse_image(len(images), Path(image), Path(annotation), odd))
    return DetectionDataset(f"voc {'+'.join(years)} {image_set}", images, VOC_CLASSES, False, odd)


def parse_image(image_id: int, path: Path, annotation: Path, odd: Counter) -> AnnotatedImage:
    try:
        tree = parse(annotation).getroot()
        size = int(get_text(tree, "size/height")), int(get_text(tree, "size/width"))
        if min(size) < 1:
            raise ValueError(f"a size of {size[0]} x {size[1]} pixels")
        objects = [parse_object(item, odd) for item in tree.findall("object")]
    except OSError as error:
        raise UserError(f"{annotation}: {error.strerror}") from error
    except (ParseError, ValueError) as error:
        raise UserError(f"{annotation}: {error}") from error
    return build_annotated_image(image_id, path, size, objects, odd)


def parse_object(item: Element, odd: Counter) -> Object:
    """Parse one object. Raise ValueError if it is invalid."""
    name = get_text(item, "name")
    if name not in VOC_CLASSES:
        raise ValueError(f"unknown class {name!r}")
    corners = ("xmin", "ymin", "xmax", "ymax")
    x0, y0, x1, y1 = (float(get_text(item, f"bndbox/{corner}")) for corner in corners)
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(f"a box of {x0}, {y0}, {x1}, {y1}")
    difficult = item.findtext("difficult")
    if difficult is None:
        odd["objects without difficult, treated as easy"] += 1
    elif difficult.strip() not in ("0", "1"):
        raise ValueError(f"difficult is {difficult!r}, neither 0 nor 1")
    ignored = difficult is not None and difficult.strip() == "1"
    box = x0 - 1, y0 - 1, x1, y1
    return Object(box, VOC_CLASSES.index(name) + 1, ignored=ignored, trains=True)


def get_text(element: Element, path: str) -> str:
    """Return the text of an element below this one. Raise ValueError if there is none."""
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"{element.tag} without {path}")
    return text.strip()
