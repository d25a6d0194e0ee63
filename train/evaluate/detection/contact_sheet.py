"""Contact sheet of annotated and detected objects."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pipeline.contact_sheet import Tile, draw_png, fit_letterbox, render_html
from train.evaluate.detection.data import AnnotatedImage, DetectionDataset
from train.evaluate.detection.loader import decode_masks
from train.evaluate.detection.metric import Detection

MAX_IMAGES = 12
"""Maximum number of images on the sheet."""
MIN_SCORE = 0.5
TRUTH_COLOR, DETECTION_COLOR = (0, 110, 80), (185, 75, 0)  # distinct for color-blind readers too
TINT = 0.45
"""Opacity of masks."""


@dataclass(frozen=True)
class DrawnObject:
    """An object to draw: x0 y0 x1 y1 in pixels, its name, and its (H, W) mask or None."""

    box: tuple[float, ...]
    name: str
    mask: np.ndarray | None


def write_sheet(folder: Path, data: DetectionDataset, detections: list[Detection]) -> None:
    """Write detections.png and detections.html: annotated and detected objects side by side."""
    rows = []
    for image in data.images[:MAX_IMAGES]:
        truth = list_annotated(image, data)
        detected = list_detected(image, data, detections)
        truth_image = draw_objects(image, truth, TRUTH_COLOR)
        detected_image = draw_objects(image, detected, DETECTION_COLOR)
        rows.append(
            [
                Tile("annotated", truth_image, image.path.stem[:30]),
                Tile("detected", detected_image, f"{len(detected)} with score >= {MIN_SCORE}"),
            ]
        )
    if rows:
        title, note = f"Detections: {data.name}", "The first images of the test set."
        draw_png(title, note, rows).save(folder / "detections.png")
        (folder / "detections.html").write_text(render_html(title, note, rows))


def list_annotated(image: AnnotatedImage, data: DetectionDataset) -> list[DrawnObject]:
    masks = list(decode_masks(image)) if data.has_masks else [None] * len(image.boxes)
    return [
        DrawnObject(tuple(box.tolist()), data.classes[label - 1], mask)
        for box, label, mask in zip(image.boxes, image.labels, masks, strict=True)
    ]


def list_detected(
    image: AnnotatedImage, data: DetectionDataset, detections: list[Detection]
) -> list[DrawnObject]:
    """Return the detections in this image whose score is at least MIN_SCORE."""
    confident = [
        row for row in detections if row["image_id"] == image.image_id and row["score"] >= MIN_SCORE
    ]
    objects = []
    for row in confident:
        x, y, width, height = row["bbox"]
        name = f"{data.classes[row['category_id'] - 1]} {row['score']:.2f}"
        mask = coco_mask.decode(row["segmentation"]) if "segmentation" in row else None
        objects.append(DrawnObject((x, y, x + width, y + height), name, mask))
    return objects


def draw_objects(
    image: AnnotatedImage, objects: list[DrawnObject], color: tuple[int, int, int]
) -> Image.Image:
    """Draw the image in a tile, with masks, boxes and their names."""
    with Image.open(image.path) as file:
        pixels = np.array(file.convert("RGB"))
    for item in objects:
        if item.mask is not None:
            inside = item.mask.astype(bool)
            pixels[inside] = (1 - TINT) * pixels[inside] + TINT * np.array(color)
    tile, to_tile = fit_letterbox(Image.fromarray(pixels))
    height, width = image.size
    draw = ImageDraw.Draw(tile)
    for item in objects:
        x0, y0 = to_tile(item.box[0] / width, item.box[1] / height)
        x1, y1 = to_tile(item.box[2] / width, item.box[3] / height)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
        # above the box if there is room, so that the names of nested boxes stay legible
        position = (x0 + 2, y0 - 12 if y0 >= 12 else y0 + 2)
        draw.rectangle(draw.textbbox(position, item.name), fill=color)
        draw.text(position, item.name, fill="white")
    return tile
