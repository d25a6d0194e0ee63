"""COCO's annotation files, each entry checked.

pycocotools' own index keeps the last of several entries with one id and takes what an entry lacks
for a KeyError without its name, so the file is read here.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from schemas import UserError
from train.evaluate.detection.data import Object, Pictures, picture

Entry = dict[str, Any]


def read_coco(root: str, split: str, annotations: str | None = None) -> Pictures:
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
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not a COCO annotation file: no JSON ({error})") from error
    try:
        return pictures_of(content, f"coco {split}", folder)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def pictures_of(content: Any, name: str, folder: Path) -> Pictures:
    """What a whole file says. Raises ValueError that names the entry."""
    if not isinstance(content, dict):
        raise ValueError("not a COCO annotation file: no JSON object")
    categories = by_id(content, "categories", "category")
    images = by_id(content, "images", "image")
    annotations = by_id(content, "annotations", "annotation")
    label_of = {number: label for label, number in enumerate(sorted(categories), 1)}
    masks = any(one.get("segmentation") for one in annotations.values())
    odd: Counter = Counter()
    objects = defaultdict(list)
    for number in sorted(annotations):
        one = annotations[number]
        with_number = f"annotation {number}"
        image = whole(one, "image_id", with_number)
        if image not in images:
            raise ValueError(f"{with_number} is of image {image}, which the file does not list")
        size = size_of(images[image])
        objects[image].append(object_of(one, with_number, size, label_of, masks, odd))
    found = [
        picture(
            number,
            folder / str(value(images[number], "file_name", f"image {number}")),
            size_of(images[number]),
            objects[number],
            odd,
        )
        for number in sorted(images)
    ]
    classes = tuple(str(value(categories[k], "name", f"category {k}")) for k in sorted(categories))
    return Pictures(name, found, classes, masks, odd)


def by_id(content: Entry, kind: str, name: str) -> dict[int, Entry]:
    """A list of the file by the ids of its entries. Raises ValueError: no list, or an id twice."""
    entries = content.get(kind)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise ValueError(f"not a COCO annotation file: it has no list of {kind}")
    found: dict[int, Entry] = {}
    for one in entries:
        number = whole(one, "id", f"one of the {kind}")
        if number in found:
            raise ValueError(f"{name} {number} is there twice")
        found[number] = one
    return found


def object_of(
    one: Entry,
    name: str,
    size: tuple[int, int],
    label_of: dict[int, int],
    masks: bool,
    odd: Counter,
) -> Object:
    """One annotation; `masks` says whether it must have a segmentation. Raises ValueError."""
    category = whole(one, "category_id", name)
    if category not in label_of:
        raise ValueError(f"{name} is of category {category}, which the file does not list")
    box = value(one, "bbox", name)
    if not (numbers(box) and len(box) == 4):
        raise ValueError(f"{name}: its bbox is {box!r}, not four finite numbers")
    x, y, width, height = map(float, box)
    if "iscrowd" not in one:
        odd["objects without iscrowd, taken for single ones"] += 1
    crowd = one.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{name}: its iscrowd is {crowd!r}, neither 0 nor 1")
    mask = segmentation(one, name, size) if masks else None
    corners = x, y, x + width, y + height
    return Object(corners, label_of[category], ignored=bool(crowd), trains=not crowd, mask=mask)


def segmentation(one: Entry, name: str, size: tuple[int, int]) -> Any:
    """Polygons of three points and more, or run lengths of this picture. Raises ValueError."""
    mask = one.get("segmentation")
    if not mask:
        raise ValueError(f"{name} has no segmentation, while others of the file have one")
    if isinstance(mask, list):
        if not all(numbers(part) and len(part) >= 6 and len(part) % 2 == 0 for part in mask):
            raise ValueError(f"{name}: its segmentation holds what is no polygon")
    elif not (
        isinstance(mask, dict)
        and mask.get("size") == list(size)
        and isinstance(mask.get("counts"), list | str)
    ):
        raise ValueError(f"{name}: its segmentation is no run lengths of {size[0]} x {size[1]}")
    return mask


def size_of(image: Entry) -> tuple[int, int]:
    """Height and width that an image is said to have. Raises ValueError."""
    name = f"image {image['id']}"
    size = value(image, "height", name), value(image, "width", name)
    if not (numbers(size) and min(size) >= 1 and all(side == int(side) for side in size)):
        raise ValueError(f"{name}: its size is {size[0]!r} x {size[1]!r}")
    return int(size[0]), int(size[1])


def value(one: Entry, key: str, name: str) -> Any:
    """Raises ValueError where an entry lacks a key."""
    if key not in one:
        raise ValueError(f"{name} has no {key}")
    return one[key]


def whole(one: Entry, key: str, name: str) -> int:
    """Raises ValueError where an entry lacks a key, or it is no whole number."""
    number = value(one, key, name)
    if not isinstance(number, int):
        raise ValueError(f"{name}: its {key} is {number!r}, no whole number")
    return number


def numbers(values: Any) -> bool:
    """Whether these are finite numbers, in a list or tuple."""
    return isinstance(values, list | tuple) and all(
        isinstance(x, int | float) and math.isfinite(x) for x in values
    )
