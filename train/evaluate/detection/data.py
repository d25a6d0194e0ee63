"""Sets of pictures with objects, whatever they were read from (`coco.py`, `voc.py`).

What cannot be trained on is left out and counted; what nobody could mean is refused with the file's
name: a missing picture, a category that the set does not have, an annotation that cannot be read.
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

LEAST_SIDE = 1e-2
"""Of a box, in pixels: torchvision finds none that are smaller, and scaling may leave nothing."""

Box = tuple[float, float, float, float]


class Object(NamedTuple):
    """One object of a picture, as `Picture` says of its rows."""

    box: Box
    label: int
    ignored: bool
    trains: bool
    mask: Any = None


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
        masks: n segmentations as COCO has them; empty in a set without.
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
        """sha256 over all that was read; of the pixels only their number."""
        content = hashlib.sha256(repr(self.classes).encode())
        for one in self.pictures:
            content.update(f"{one.path.name} {one.size}".encode())
            for values in (one.boxes, one.labels, one.ignored, one.trains):
                content.update(values.tobytes())
            content.update(json.dumps(one.masks, sort_keys=True).encode())
        return content.hexdigest()

    def trainable(self) -> "list[Picture]":
        """Pictures with an object to train on."""
        return [p for p in self.pictures if p.trains.any()]

    def testable(self) -> bool:
        """Whether there is an object to be found."""
        return any((~p.ignored).any() for p in self.pictures)


def clipped(box: Box, size: tuple[int, int], odd: Counter) -> np.ndarray | None:
    """The part of a box that lies in the picture, (4,) float32; None where that is nothing.

    Counts either.
    """
    height, width = size
    x0, y0, x1, y1 = box
    inside = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    kept = np.array(inside, np.float32)
    if (kept[2:] - kept[:2]).min() < LEAST_SIDE:
        odd["boxes without area left out"] += 1
        return None
    if inside != box:
        odd["boxes cut to their picture"] += 1
    return kept


def picture(
    number: int, path: Path, size: tuple[int, int], objects: list[Object], odd: Counter
) -> Picture:
    """Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: no such picture, but it is annotated")
    inside = [clipped(one.box, size, odd) for one in objects]
    boxes = [box for box in inside if box is not None]
    kept = [one for one, box in zip(objects, inside, strict=True) if box is not None]
    return Picture(
        number,
        path,
        size,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([one.label for one in kept], np.int64),
        np.array([one.ignored for one in kept], bool),
        np.array([one.trains for one in kept], bool),
        [one.mask for one in kept if one.mask is not None],
    )
