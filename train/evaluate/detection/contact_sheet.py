"""Contact sheet of annotated and detected objects."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pipeline.contact_sheet import TILE, Tile, draw_png, fit_into_tile, render_html
from train.evaluate.detection.data import Picture, Pictures
from train.evaluate.detection.loader import decode_masks
from train.evaluate.detection.metric import Detection

SHOWN = 12
"""Number of pictures on the sheet."""
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


def write_sheet(folder: Path, data: Pictures, detections: list[Detection]) -> None:
    """Write detections.png and detections.html: annotated and detected objects side by side."""
    rows = []
    for picture in data.pictures[:SHOWN]:
        truth = list_annotated(picture, data)
        detected = list_detected(picture, data, detections)
        truth_image = draw_objects(picture, truth, TRUTH_COLOR)
        detected_image = draw_objects(picture, detected, DETECTION_COLOR)
        rows.append(
            [
                Tile("annotated", truth_image, picture.path.stem[:30]),
                Tile("detected", detected_image, f"{len(detected)} with score >= {MIN_SCORE}"),
            ]
        )
    if rows:
        title, note = f"Detections: {data.name}", "The first pictures of the test set."
        draw_png(title, note, rows).save(folder / "detections.png")
        (folder / "detections.html").write_text(render_html(title, note, rows))


def list_annotated(picture: Picture, data: Pictures) -> list[DrawnObject]:
    masks = list(decode_masks(picture)) if data.masks else [None] * len(picture.boxes)
    return [
        DrawnObject(tuple(box.tolist()), data.classes[label - 1], mask)
        for box, label, mask in zip(picture.boxes, picture.labels, masks, strict=True)
    ]


def list_detected(
    picture: Picture, data: Pictures, detections: list[Detection]
) -> list[DrawnObject]:
    """Return the detections in this picture whose score is at least MIN_SCORE."""
    confident = [
        row for row in detections if row["image_id"] == picture.number and row["score"] >= MIN_SCORE
    ]
    objects = []
    for row in confident:
        x, y, width, height = row["bbox"]
        name = f"{data.classes[row['category_id'] - 1]} {row['score']:.2f}"
        mask = coco_mask.decode(row["segmentation"]) if "segmentation" in row else None
        objects.append(DrawnObject((x, y, x + width, y + height), name, mask))
    return objects


def draw_objects(
    picture: Picture, objects: list[DrawnObject], color: tuple[int, int, int]
) -> Image.Image:
    """Draw the picture fitted into a tile, with masks, boxes and their names."""
    with Image.open(picture.path) as image:
        pixels = np.array(image.convert("RGB"))
    for item in objects:
        if item.mask is not None:
            inside = item.mask.astype(bool)
            pixels[inside] = (1 - TINT) * pixels[inside] + TINT * np.array(color)
    fitted = fit_into_tile(Image.fromarray(pixels))
    scale = TILE / max(picture.size)
    draw = ImageDraw.Draw(fitted)
    for item in objects:
        x0, y0, x1, y1 = (value * scale for value in item.box)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=2)
        # above the box if there is room, so that the names of nested boxes stay legible
        position = (x0 + 2, y0 - 12 if y0 >= 12 else y0 + 2)
        draw.rectangle(draw.textbbox(position, item.name), fill=color)
        draw.text(position, item.name, fill="white")
    tile = Image.new("RGB", (TILE, TILE), (228, 228, 224))
    tile.paste(fitted, (0, 0))
    return tile
