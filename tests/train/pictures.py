"""A small COCO tree of the true layout."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from train.evaluate.detection.data import Pictures, coco


def shapes(index: int) -> tuple[np.ndarray, list[float]]:
    """A bright box on dark ground, and where it is."""
    random = np.random.default_rng(index)
    pixels = random.integers(0, 60, (96, 128, 3), dtype=np.uint8)
    x, y = (int(v) for v in random.integers(5, 40, 2))
    width, height = (int(v) for v in random.integers(40, 56, 2))
    pixels[y : y + height, x : x + width] = (230, 40, 40) if index % 2 else (40, 220, 60)
    return pixels, [x, y, width, height]


def write_coco(root: Path, split: str, count: int = 6, **changes) -> Path:
    """A tree of the true layout: rectangles as polygons, one crowd, one picture of nothing."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, (x, y, width, height) = shapes(index)
        Image.fromarray(pixels).save(root / split / f"{index:012d}.jpg", quality=95)
        images.append({"id": index, "file_name": f"{index:012d}.jpg", "height": 96, "width": 128})
        if index == count - 1:
            continue
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotations.append(
            {
                "id": index + 1,
                "image_id": index,
                "category_id": 7 if index % 2 else 3,
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "green"}, {"id": 7, "name": "red"}],
        **changes,
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def odd_coco(root: Path, **one) -> Pictures:
    file = write_coco(root, "train2017")
    content = json.loads(file.read_text())
    content["annotations"][0] |= one
    file.write_text(json.dumps(content))
    return coco(str(root), "train2017")
