"""Datasets of images with annotated objects, as `coco.py` and `voc.py` read them.

Objects that cannot be trained on are left out and counted. Obvious mistakes are refused with the
name of the file: a missing image, an unknown category, an annotation that cannot be read.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from schemas import UserError

MIN_SIDE = 1e-2
"""Shortest side of a box in pixels: torchvision detects no smaller ones, and scaling down could
leave nothing."""

Box = tuple[float, float, float, float]


class Object(NamedTuple):
    """One object of an image; `AnnotatedImage` explains the fields."""

    box: Box
    label: int
    ignored: bool
    trains: bool
    mask: Any = None


@dataclass(frozen=True)
class AnnotatedImage:
    """One image and its annotated objects.

    Attributes:
        image_id: unique number of the image in its dataset.
        path: path of its file.
        size: (height, width) in pixels.
        boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, inside the image.
        labels: (n,) int64, from 1.
        ignored: (n,) bool, True for crowds of COCO and difficult objects of VOC: a test counts them
            neither as found nor as missed.
        trains: (n,) bool, True for objects to train on: all but crowds, as in detectron2.
        masks: n segmentations in COCO's format; empty in a dataset without masks.
    """

    image_id: int
    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    trains: np.ndarray
    masks: list[Any]


@dataclass(frozen=True)
class DetectionDataset:
    """Images, names of the classes, and counts of objects that were changed or left out."""

    name: str
    images: list[AnnotatedImage]
    classes: tuple[str, ...]
    has_masks: bool
    odd: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def title(self) -> str:
        return self.name

    @cached_property
    def digest(self) -> str:
        """sha256 of the annotations, file names and image sizes; pixels are not included."""
        content = hashlib.sha256(repr(self.classes).encode())
        for image in self.images:
            content.update(f"{image.path.name} {image.size}".encode())
            for values in (image.boxes, image.labels, image.ignored, image.trains):
                content.update(values.tobytes())
            content.update(json.dumps(image.masks, sort_keys=True).encode())
        return content.hexdigest()

    def select_trainable(self) -> list[AnnotatedImage]:
        """Return the images that have an object to train on."""
        return [image for image in self.images if image.trains.any()]

    def is_testable(self) -> bool:
        """Return whether there is an object to detect."""
        return any((~image.ignored).any() for image in self.images)


def clip_box(box: Box, size: tuple[int, int], odd: Counter) -> np.ndarray | None:
    """Return the part of a box inside the image, (4,) float32, or None if nothing is left.

    Counts boxes that were clipped and boxes that were left out in `odd`.
    """
    height, width = size
    x0, y0, x1, y1 = box
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    clipped = np.array(inside, np.float32)
    if (clipped[2:] - clipped[:2]).min() < MIN_SIDE:
        odd["boxes without area left out"] += 1
        return None
    if inside != box:
        odd["boxes clipped to the image"] += 1
    return clipped


def build_annotated_image(
    image_id: int, path: Path, size: tuple[int, int], objects: list[Object], odd: Counter
) -> AnnotatedImage:
    """Build an annotated image from its objects. Raise UserError if its file does not exist."""
    if not path.is_file():
        raise UserError(f"{path}: no such image, but it is annotated")
    clipped = [clip_box(item.box, size, odd) for item in objects]
    boxes = [box for box in clipped if box is not None]
    kept = [item for item, box in zip(objects, clipped, strict=True) if box is not None]
    return AnnotatedImage(
        image_id,
        path,
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([item.label for item in kept], np.int64),
        np.array([item.ignored for item in kept], bool),
        np.array([item.trains for item in kept], bool),
        [item.mask for item in kept if item.mask is not None],
    )
