"""Pictures with what was found in them, for a person to look at."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pipeline.contact_sheet import TILE, Tile, draw_png, fit_into_tile, render_html
from train.evaluate.detection.data import Picture, Pictures
from train.evaluate.detection.metric import Found
from train.evaluate.detection.views import masks_of

SHOWN = 12
LEAST_SCORE = 0.5
TRUTH, FOUND = (0, 110, 80), (185, 75, 0)  # told apart by the colour-blind as well
TINT = 0.45


@dataclass(frozen=True)
class Shown:
    """An object: x0 y0 x1 y1 in pixels, its name, and its (H, W) mask where there is one."""

    box: tuple[float, ...]
    name: str
    mask: np.ndarray | None


def write_sheet(folder: Path, data: Pictures, found: list[Found]) -> None:
    """detections.png and detections.html: annotated and found objects, side by side."""
    rows = []
    for one in data.pictures[:SHOWN]:
        truth, guesses = annotated(one, data), detected(one, data, found)
        rows.append(
            [
                Tile("annotated", drawn(one, truth, TRUTH), one.path.stem[:30]),
                Tile("found", drawn(one, guesses, FOUND), f"{len(guesses)} of score 0.5 and more"),
            ]
        )
    if rows:
        title, note = f"Detections: {data.name}", "The first pictures of the test set."
        draw_png(title, note, rows).save(folder / "detections.png")
        (folder / "detections.html").write_text(render_html(title, note, rows))


def annotated(one: Picture, data: Pictures) -> list[Shown]:
    masks = list(masks_of(one)) if data.masks else [None] * len(one.boxes)
    return [
        Shown(tuple(box.tolist()), data.classes[label - 1], mask)
        for box, label, mask in zip(one.boxes, one.labels, masks, strict=True)
    ]


def detected(one: Picture, data: Pictures, found: list[Found]) -> list[Shown]:
    sure = [row for row in found if row["image_id"] == one.number and row["score"] >= LEAST_SCORE]
    shown = []
    for row in sure:
        x, y, width, height = row["bbox"]
        name = f"{data.classes[row['category_id'] - 1]} {row['score']:.2f}"
        mask = coco_mask.decode(row["segmentation"]) if "segmentation" in row else None
        shown.append(Shown((x, y, x + width, y + height), name, mask))
    return shown


def drawn(one: Picture, objects: list[Shown], colour: tuple[int, int, int]) -> Image.Image:
    """The picture fitted into a tile, with masks, boxes and their names."""
    with Image.open(one.path) as image:
        pixels = np.array(image.convert("RGB"))
    for shown in objects:
        if shown.mask is not None:
            inside = shown.mask.astype(bool)
            pixels[inside] = (1 - TINT) * pixels[inside] + TINT * np.array(colour)
    fitted = fit_into_tile(Image.fromarray(pixels))
    scale = TILE / max(one.size)
    draw = ImageDraw.Draw(fitted)
    for shown in objects:
        x0, y0, x1, y1 = (value * scale for value in shown.box)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        # above its box where there is room, so that the names of nested boxes can all be read
        place = (x0 + 2, y0 - 12 if y0 >= 12 else y0 + 2)
        draw.rectangle(draw.textbbox(place, shown.name), fill=colour)
        draw.text(place, shown.name, fill="white")
    tile = Image.new("RGB", (TILE, TILE), (228, 228, 224))
    tile.paste(fitted, (0, 0))
    return tile
