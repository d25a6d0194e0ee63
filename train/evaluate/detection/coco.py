"""Read COCO annotation files and check each entry.

pycocotools is not used for this: of several entries with one id its index keeps the last, and for a
missing field it raises a KeyError that does not name the entry.
"""

import codecs
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    StrictInt,
    ValidationError,
)
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from schemas import UserError
from train.evaluate.detection.data import DetectionDataset, Object, build_annotated_image

Side = Annotated[int, Field(ge=1)]
Coordinate = Annotated[FiniteFloat, Field(strict=True)]
Polygon = Annotated[list[StrictInt | Coordinate], Field(min_length=6)]
"""x0, y0, x1, y1 ... of at least three points; integers stay integers."""


class RunLengths(TypedDict):
    size: list[int]
    counts: list[int] | str


class Entry(BaseModel):
    """One entry of an annotation file; fields that are not named here are ignored."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: StrictInt


class Category(Entry):
    name: str


class Image(Entry):
    file_name: str
    height: Side
    width: Side

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


class Annotation(Entry):
    image_id: StrictInt
    category_id: StrictInt
    bbox: tuple[Coordinate, Coordinate, Coordinate, Coordinate]
    iscrowd: Annotated[int, Field(ge=0, le=1)] | None = None
    segmentation: Annotated[
        list[Polygon] | RunLengths | None, BeforeValidator(lambda value: value or None)
    ] = None


class Content(BaseModel):
    """A whole file. The first wrong entry ends the check: 860,000 errors would fill the memory."""

    categories: Annotated[list[Category], FailFast()]
    images: Annotated[list[Image], FailFast()]
    annotations: Annotated[list[Annotation], FailFast()]


AnyEntry = TypeVar("AnyEntry", bound=Entry)
SINGULAR = {"categories": "category", "images": "image", "annotations": "annotation"}


def read_coco(root: str, split: str, annotations: str | None = None) -> DetectionDataset:
    """Read a split of COCO.

    Args:
        root: folder with annotations/instances_SPLIT.json and images in SPLIT or images/SPLIT.
        annotations: another annotation file.

    Raises:
        UserError: a file is missing or invalid.
    """
    file = Path(annotations or Path(root) / "annotations" / f"instances_{split}.json")
    folders = [Path(root) / split, Path(root) / "images" / split]
    folder = next((f for f in folders if f.is_dir()), None)
    if not file.is_file():
        raise UserError(f"no {file}, the annotations of {split}")
    if folder is None:
        raise UserError(f"no folder {folders[0]} or {folders[1]} with the images of {split}")
    text = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return build_dataset(Content.model_validate_json(text), f"coco {split}", folder)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, text)}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def explain(error: ValidationError, text: bytes) -> str:
    """Return the first problem of a file, with the number of the entry that has it."""
    # of a union, the error of the variant that fits best
    first = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    location, reason = first["loc"], first["msg"]
    if len(location) < 2:  # of the whole file or of one of its lists
        return ": ".join(["not a COCO annotation file", *map(str, location), reason])
    kind, place, *field = location
    entry = json.loads(text)[kind][place]
    if not field:  # the entry is no object
        return f"{SINGULAR[str(kind)]} number {place}: {reason}"
    name = f"{SINGULAR[str(kind)]} {entry.get('id', 'without id')}"
    return f"{name}: {'.'.join(map(str, field))}: {reason}"


def build_dataset(content: Content, name: str, folder: Path) -> DetectionDataset:
    """Build the dataset of a file. Raise ValueError that names an entry that does not fit."""
    categories = index_by_id(content.categories, "category")
    images = index_by_id(content.images, "image")
    annotations = index_by_id(content.annotations, "annotation")
    labels = {number: label for label, number in enumerate(sorted(categories), 1)}
    has_masks = any(entry.segmentation for entry in annotations.values())
    odd: Counter = Counter()
    objects = defaultdict(list)
    for number, entry in sorted(annotations.items()):
        what = f"annotation {number}"
        if entry.image_id not in images:
            raise ValueError(f"{what} is of image {entry.image_id}, which the file does not list")
        if entry.category_id not in labels:
            raise ValueError(
                f"{what} is of category {entry.category_id}, which the file does not list"
            )
        if has_masks:
            check_segmentation(entry, images[entry.image_id].size)
        if entry.iscrowd is None:
            odd["objects without iscrowd, treated as single objects"] += 1
        objects[entry.image_id].append(build_object(entry, labels, has_masks))
    annotated = [
        build_annotated_image(
            image_id, folder / image.file_name, image.size, objects[image_id], odd
        )
        for image_id, image in sorted(images.items())
    ]
    classes = tuple(categories[number].name for number in sorted(categories))
    return DetectionDataset(name, annotated, classes, has_masks, odd)


def index_by_id(entries: Sequence[AnyEntry], name: str) -> dict[int, AnyEntry]:
    """Index entries by id. Raise ValueError if an id appears twice."""
    indexed: dict[int, AnyEntry] = {}
    for entry in entries:
        if entry.id in indexed:
            raise ValueError(f"{name} {entry.id} is there twice")
        indexed[entry.id] = entry
    return indexed


def check_segmentation(entry: Annotation, size: tuple[int, int]) -> None:
    """Raise ValueError unless there are whole polygons, or run lengths of this image's size."""
    mask, name = entry.segmentation, f"annotation {entry.id}"
    if not mask:
        raise ValueError(f"{name} has no segmentation, while others of the file have one")
    if isinstance(mask, list):
        if any(len(polygon) % 2 for polygon in mask):
            raise ValueError(f"{name}: its segmentation has half a point")
    elif mask["size"] != list(size):
        raise ValueError(f"{name}: its run lengths are not of {size[0]} x {size[1]} pixels")


def build_object(entry: Annotation, labels: dict[int, int], has_masks: bool) -> Object:
    x, y, width, height = entry.bbox
    crowd = bool(entry.iscrowd)
    return Object(
        (x, y, x + width, y + height),
        labels[entry.category_id],
        ignored=crowd,
        trains=not crowd,
        mask=entry.segmentation if has_masks else None,
    )
