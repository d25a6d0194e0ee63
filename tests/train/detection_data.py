"""Small datasets in the layouts of COCO and VOC, an encoder, and short detection runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from train.encoders import build_encoder, save_encoder
from train.evaluate.detection.coco import read_coco
from train.evaluate.detection.command import DetectionOptions, Schedule
from train.evaluate.detection.data import DetectionDataset

SHORT = Schedule(iterations=8, units=2, milestones=(1,))
"""A schedule of two parts of four steps."""


def shapes(index: int) -> tuple[np.ndarray, list[float]]:
    """Draw a bright box on a dark background; return the pixels and the box."""
    random = np.random.default_rng(index)
    pixels = random.integers(0, 60, (96, 128, 3), dtype=np.uint8)
    x, y = (int(v) for v in random.integers(5, 40, 2))
    width, height = (int(v) for v in random.integers(40, 56, 2))
    pixels[y : y + height, x : x + width] = (230, 40, 40) if index % 2 else (40, 220, 60)
    return pixels, [x, y, width, height]


def write_coco(root: Path, split: str, count: int = 6, **changes) -> Path:
    """Write a split in COCO's layout: rectangles as polygons, one image without objects."""
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


def odd_coco(root: Path, **one) -> DetectionDataset:
    """Write such a split and change its first annotation; None removes a key."""
    file = write_coco(root, "train2017")
    content = json.loads(file.read_text())
    first = content["annotations"][0] | one
    content["annotations"][0] = {key: value for key, value in first.items() if value is not None}
    file.write_text(json.dumps(content))
    return read_coco(str(root), "train2017")


def write_voc(root: Path, objects: str, size: str = "<height>96</height><width>128</width>") -> str:
    """Write one black image of 96 x 128 in VOC's layout; `objects` is the XML of its objects."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000001\n")
    Image.new("RGB", (128, 96)).save(base / "JPEGImages/000001.jpg")
    text = f"<annotation><size>{size}</size>{objects}</annotation>"
    (base / "Annotations/000001.xml").write_text(text)
    return str(root)


def voc_object(
    name: str, difficult: str = "<difficult>0</difficult>", xmin: str = "<xmin>1</xmin>"
) -> str:
    box = f"{xmin}<ymin>11</ymin><xmax>50</xmax><ymax>60</ymax>"
    return f"<object><name>{name}</name>{difficult}<bndbox>{box}</bndbox></object>"


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """Write the folder of a run with a ResNet-18 of random weights."""
    torch.manual_seed(seed)
    network, _ = build_encoder("resnet18")
    folder.mkdir(exist_ok=True)
    metadata = {
        "encoder": "resnet18", "method": "moco", "recipe": "hp", "crop_size": "224", "seed": "0",
        "high_pass": "False", "high_pass_kernel": "11", "high_pass_sigma": "5.0",
    }  # fmt: skip
    save_encoder(folder / "encoder.safetensors", network, metadata)
    return folder


def options_of(root: Path, encoder: Path, **changes) -> DetectionOptions:
    """Return options with tiny images and few RoIs."""
    options = DetectionOptions(
        encoder=str(encoder), dataset="coco", root=str(root), batch_size=2, short_sides=(64,),
        test_side=64, rois=4, proposals=4, workers=0, device="cpu", log_steps=1, precision="fp32",
    )  # fmt: skip
    return replace(options, **changes)


def losses(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]
