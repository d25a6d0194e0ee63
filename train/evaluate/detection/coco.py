"""Read COCO annotation files and check each entry.

pycocotools is not used for this: of several entries with one id its index keeps the last, and for a
missing field it raises a KeyError that does not name the entry.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from schemas import UserError
from train.evaluate.detection.data import Object, Pictures, build_picture

Entry = dict[str, Any]


def read_coco(root: str, split: str, annotations: str | None = None) -> Pictures:
    """Read a split of COCO.

    Args:
        root: folder with annotations/instances_SPLIT.json and pictures in SPLIT or images/SPLIT.
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
        raise UserError(f"no folder {folders[0]} or {folders[1]} with the pictures of {split}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not a COCO annotation file: no JSON ({error})") from error
    try:
        return parse_content(content, f"coco {split}", folder)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def parse_content(content: Any, name: str, folder: Path) -> Pictures:
    """Check and parse the content of a file. Raise ValueError that names the invalid entry."""
    if not isinstance(content, dict):
        raise ValueError("not a COCO annotation file: no JSON object")
    categories = index_by_id(content, "categories", "category")
    images = index_by_id(content, "images", "image")
    annotations = index_by_id(content, "annotations", "annotation")
    labels = {number: label for label, number in enumerate(sorted(categories), 1)}
    masks = any(entry.get("segmentation") for entry in annotations.values())
    odd: Counter = Counter()
    objects = defaultdict(list)
    for number in sorted(annotations):
        entry = annotations[number]
        entry_name = f"annotation {number}"
        image = get_integer(entry, "image_id", entry_name)
        if image not in images:
            raise ValueError(f"{entry_name} is of image {image}, which the file does not list")
        size = get_size(images[image])
        objects[image].append(parse_object(entry, entry_name, size, labels, masks, odd))
    pictures = [
        build_picture(
            number,
            folder / str(get_value(images[number], "file_name", f"image {number}")),
            get_size(images[number]),
            objects[number],
            odd,
        )
        for number in sorted(images)
    ]
    classes = tuple(
        str(get_value(categories[k], "name", f"category {k}")) for k in sorted(categories)
    )
    return Pictures(name, pictures, classes, masks, odd)


def index_by_id(content: Entry, kind: str, name: str) -> dict[int, Entry]:
    """Index a list of the file by id. Raise ValueError if it is missing or an id appears twice."""
    entries = content.get(kind)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"not a COCO annotation file: it has no list of {kind}")
    indexed: dict[int, Entry] = {}
    for entry in entries:
        number = get_integer(entry, "id", f"one of the {kind}")
        if number in indexed:
            raise ValueError(f"{name} {number} is there twice")
        indexed[number] = entry
    return indexed


def parse_object(
    entry: Entry,
    name: str,
    size: tuple[int, int],
    labels: dict[int, int],
    masks: bool,
    odd: Counter,
) -> Object:
    """Parse one annotation; with `masks` it must have a segmentation. Raise ValueError if not."""
    category = get_integer(entry, "category_id", name)
    if category not in labels:
        raise ValueError(f"{name} is of category {category}, which the file does not list")
    box = get_value(entry, "bbox", name)
    if not (are_finite(box) and len(box) == 4):
        raise ValueError(f"{name}: its bbox is {box!r}, not four finite numbers")
    x, y, width, height = map(float, box)
    if "iscrowd" not in entry:
        odd["objects without iscrowd, treated as single objects"] += 1
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{name}: its iscrowd is {crowd!r}, neither 0 nor 1")
    mask = check_segmentation(entry, name, size) if masks else None
    corners = x, y, x + width, y + height
    return Object(corners, labels[category], ignored=bool(crowd), trains=not crowd, mask=mask)


def check_segmentation(entry: Entry, name: str, size: tuple[int, int]) -> Any:
    """Return polygons of at least three points, or run lengths of this picture's size.

    Raises:
        ValueError: the segmentation is missing or neither of these.
    """
    mask = entry.get("segmentation")
    if not mask:
        raise ValueError(f"{name} has no segmentation, while others of the file have one")
    if isinstance(mask, list):
        if not all(are_finite(part) and len(part) >= 6 and len(part) % 2 == 0 for part in mask):
            raise ValueError(f"{name}: its segmentation contains an invalid polygon")
    elif not (
        isinstance(mask, dict)
        and mask.get("size") == list(size)
        and isinstance(mask.get("counts"), list | str)
    ):
        raise ValueError(
            f"{name}: its segmentation is neither polygons nor run lengths of {size[0]} x {size[1]}"
        )
    return mask


def get_size(image: Entry) -> tuple[int, int]:
    """Return the height and width of an image entry. Raise ValueError if they are invalid."""
    name = f"image {image['id']}"
    size = get_value(image, "height", name), get_value(image, "width", name)
    if not (are_finite(size) and min(size) >= 1 and all(side == int(side) for side in size)):
        raise ValueError(f"{name}: its size is {size[0]!r} x {size[1]!r}")
    return int(size[0]), int(size[1])


def get_value(entry: Entry, key: str, name: str) -> Any:
    """Return a field of an entry. Raise ValueError if it is missing."""
    if key not in entry:
        raise ValueError(f"{name} has no {key}")
    return entry[key]


def get_integer(entry: Entry, key: str, name: str) -> int:
    """Return an integer field of an entry. Raise ValueError if it is missing or not an integer."""
    number = get_value(entry, key, name)
    if not isinstance(number, int):
        raise ValueError(f"{name}: its {key} is {number!r}, not an integer")
    return number


def are_finite(values: Any) -> bool:
    """Return whether this is a list or tuple of finite numbers."""
    return isinstance(values, list | tuple) and all(
        isinstance(x, int | float) and math.isfinite(x) for x in values
    )
