"""Pictures with what was found in them, for a person to look at."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from pipeline.sheet import TILE, Tile, page, png
from train.evaluate.detection.data import Picture, Pictures
from train.evaluate.detection.metric import Found

SHOWN = 12
LEAST_SCORE = 0.5
TRUTH, FOUND = (0, 158, 115), (213, 94, 0)  # told apart by the colour-blind as well


def write_sheet(folder: Path, data: Pictures, found: list[Found]) -> None:
    """detections.png and detections.html: annotated and found boxes, side by side."""
    rows = []
    for one in data.pictures[:SHOWN]:
        mine = [row for row in found if row["image_id"] == one.number]
        sure = [row for row in mine if row["score"] >= LEAST_SCORE]
        truth = [
            (box, data.classes[label - 1]) for box, label in zip(one.boxes, one.labels, strict=True)
        ]
        guesses = [
            (corners(row["bbox"]), f"{data.classes[row['category_id'] - 1]} {row['score']:.2f}")
            for row in sure
        ]
        rows.append(
            [
                Tile("annotated", drawn(one, truth, TRUTH), one.path.stem[:30]),
                Tile("found", drawn(one, guesses, FOUND), f"{len(sure)} of score 0.5 and more"),
            ]
        )
    if rows:
        title, note = f"Detections: {data.name}", "The first pictures of the test set."
        png(title, note, rows).save(folder / "detections.png")
        (folder / "detections.html").write_text(page(title, note, rows))


def corners(box: list[float]) -> tuple[float, ...]:
    x, y, width, height = box
    return x, y, x + width, y + height


def drawn(one: Picture, boxes: list, colour: tuple[int, int, int]) -> Image.Image:
    """The picture fitted into a tile, with boxes and their names."""
    with Image.open(one.path) as image:
        fitted = ImageOps.contain(image.convert("RGB"), (TILE, TILE))
    scale = fitted.width / one.size[1]
    draw = ImageDraw.Draw(fitted)
    for box, name in boxes:
        x0, y0, x1, y1 = (float(value) * scale for value in box)
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        draw.text((x0 + 3, y0 + 1), name, fill=colour)
    tile = Image.new("RGB", (TILE, TILE), (228, 228, 224))
    tile.paste(fitted, (0, 0))
    return tile
