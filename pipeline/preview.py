"""A contact sheet of what the encoder is fed: one row a sample, for a person to look at."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from pipeline import masks
from pipeline.assemble import MEAN, STD
from pipeline.batch import Batch
from pipeline.loader import MaskedViews
from pipeline.recipes import Recipe
from schemas import ShardDataset, UserError
from schemas.sample import SALIENCY_MEMBER
from schemas.tables import shard_name

TILE = 224
GAP = 12
CAPTION = 22
HEADER = 76
PAPER, INK, FAINT = (250, 250, 248), (30, 30, 30), (120, 120, 120)
QUERY, KEY = (0, 114, 178), (213, 94, 0)  # told apart by the colour-blind as well (Okabe and Ito)
FOREGROUND = (255, 214, 10)
HIGH_PASS_CONTRAST = 0.5
"""Brightness (0 .. 1) a normalised unit of a high-pass image is shown as, about middle gray."""


def write_preview(
    url: str | Path,
    recipe: Recipe,
    out: Path,
    samples: int = 12,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Write a PNG sheet of the first samples that a training run with this seed would see.

    Returns:
        Rows on the sheet: `samples`, or all that the dataset has.

    Raises:
        UserError: as `MaskedViews` does, or `samples` is below 1, or `out` cannot be written.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}, a sheet has at least 1")
    dataset = ShardDataset.open(url)
    views = MaskedViews(
        url,
        recipe,
        batch_size=max(1, min(samples, len(dataset))),
        device=device,
        seed=seed,
        report=("masks", "saliency", "windows", "keys"),
    )
    picture = sheet(dataset, next(iter(views)), recipe)
    try:
        picture.save(out, format="PNG")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return views.batch_size


def sheet(dataset: ShardDataset, batch: Batch, recipe: Recipe) -> Image.Image:
    """The whole sheet: a header, then a row a sample."""
    assert batch.sample_keys is not None
    rows = [sample_row(dataset, batch, place, recipe) for place in range(len(batch.sample_keys))]
    columns = len(rows[0])
    width = GAP + columns * (TILE + GAP)
    height = HEADER + len(rows) * (TILE + CAPTION + GAP)
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    header(draw, dataset, recipe)
    for row, tiles in enumerate(rows):
        top = HEADER + row * (TILE + CAPTION + GAP)
        for column, (tile, caption) in enumerate(tiles):
            left = GAP + column * (TILE + GAP)
            picture.paste(tile, (left, top))
            draw.text((left, top + TILE + 3), caption, fill=INK, font=font(13))
    return picture


def guided(recipe: Recipe) -> bool:
    """Whether any mask of the recipe may look at the saliency."""
    names = {recipe.query_mask} | ({recipe.hard_negative_mask} if recipe.hard_negatives else set())
    return recipe.fill != "none" and not names <= {"random", "block"}


def header(draw: ImageDraw.ImageDraw, dataset: ShardDataset, recipe: Recipe) -> None:
    details = f"fill {recipe.fill}, crop {recipe.crop_size}"
    if recipe.high_pass:
        details += ", high-pass (shown about middle gray)"
    draw.text((GAP, 8), f"{dataset.card.name}: {details}", fill=INK, font=font(16))
    columns = ["image, with the windows of", "its saliency", "query, as fed", "key, as fed"]
    columns += ["hard negative, as fed"] * recipe.hard_negatives
    for column, text in enumerate(columns):
        draw.text((GAP + column * (TILE + GAP), 50), text, fill=FAINT, font=font(13))
    left = GAP + draw.textlength(columns[0] + " ", font=font(13))
    draw.text((left, 50), "query", fill=QUERY, font=font(13))
    left += draw.textlength("query ", font=font(13))
    draw.text((left, 50), "key", fill=KEY, font=font(13))
    if guided(recipe):
        margin = f"A >= mean - {recipe.foreground_margin:g} std"
        text = f"dots and lines, not fed: cells that are foreground in the view, {margin}"
        draw.text((GAP, 29), text, fill=FAINT, font=font(13))


def sample_row(
    dataset: ShardDataset, batch: Batch, place: int, recipe: Recipe
) -> list[tuple[Image.Image, str]]:
    """Tiles of one sample, each with its caption."""
    assert batch.sample_keys is not None
    assert batch.query_window is not None
    assert batch.key_window is not None
    assert batch.query_saliency is not None
    assert batch.key_saliency is not None
    key = batch.sample_keys[place]
    image, saliency = read_sample(dataset, key)
    whole, place_of = letterboxed(image)
    heat = letterboxed(overlaid(image, saliency))[0]
    draw = ImageDraw.Draw(whole)
    for window, colour in ((batch.query_window, QUERY), (batch.key_window, KEY)):
        y0, x0, y1, x1 = window[place].tolist()
        corners = place_of(min(x0, x1), y0), place_of(max(x0, x1), y1)
        draw.rectangle((*corners[0], *corners[1]), outline=colour, width=3)

    label = int(batch.label[place])
    name = dataset.classes[label] if 0 <= label < len(dataset.classes) else "no label"
    query = view_tile(batch.query[place], batch.query_saliency[place], recipe)
    key_view = view_tile(batch.key[place], batch.key_saliency[place], recipe)
    tiles = [
        (whole, shortened(key, 30)),
        (heat, shortened(name, 30)),
        (query, caption(batch.query_mask, batch.query_ratio, batch.query_focal, place)),
        (key_view, "not masked" if batch.key_mask is None else "masked as the query"),
    ]
    for number in range(recipe.hard_negatives):
        assert batch.hard_negative is not None
        row = number * len(batch.query) + place
        tile = view_tile(batch.hard_negative[row], batch.key_saliency[place], recipe)
        text = caption(
            batch.hard_negative_mask, batch.hard_negative_ratio, batch.hard_negative_focal, row
        )
        tiles.append((tile, text))
    return tiles


def caption(mask: Tensor | None, ratio: Tensor | None, focal: Tensor | None, row: int) -> str:
    """What was drawn for one view, and how much of it is filled."""
    if mask is None or ratio is None or focal is None:
        return "not masked"
    filled = f"{float(mask[row].float().mean()):.0%} filled"
    return f"window; {filled}" if focal[row] else f"ratio {float(ratio[row]):.2f}; {filled}"


def view_tile(view: Tensor, saliency: Tensor, recipe: Recipe) -> Image.Image:
    """A (3, H, W) view as an image, its foreground cells outlined."""
    values = view.cpu().permute(1, 2, 0).numpy()
    if recipe.high_pass:
        shown = 0.5 + HIGH_PASS_CONTRAST * values
    else:
        shown = values * np.array(STD) + np.array(MEAN)
    pixels = (255 * shown.clip(0, 1)).round().astype(np.uint8)
    tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
    if guided(recipe):
        front = masks.foreground(saliency.unsqueeze(0), recipe.foreground_margin)[0]
        outline(tile, front.cpu().numpy())
    return tile


def outline(tile: Image.Image, front: np.ndarray) -> None:
    """Draw a border around the foreground cells, and a dot in each."""
    draw = ImageDraw.Draw(tile)
    side = len(front)
    cell = TILE / side
    padded = np.pad(front, 1)
    for row, column in zip(*front.nonzero(), strict=True):
        middle = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.circle(middle, 2.5, fill=FOREGROUND, outline=INK)
    for line in range(side + 1):
        at = min(round(line * cell), TILE - 1)
        for place in range(side):
            start, end = round(place * cell), round((place + 1) * cell)
            if padded[line, place + 1] != padded[line + 1, place + 1]:
                draw.line((start, at, end, at), fill=FOREGROUND, width=2)
            if padded[place + 1, line] != padded[place + 1, line + 1]:
                draw.line((at, start, at, end), fill=FOREGROUND, width=2)


def overlaid(image: Image.Image, saliency: Image.Image) -> Image.Image:
    """The image in gray, with the saliency as a red tint."""
    heat = np.asarray(saliency.resize(image.size, Image.Resampling.BICUBIC), np.float32) / 255
    gray = np.asarray(image.convert("L"), np.float32)[..., None]
    weight = 0.75 * heat[..., None]
    tinted = (1 - weight) * gray + weight * np.array([255, 40, 0], np.float32)
    return Image.fromarray(tinted.round().astype(np.uint8))


def letterboxed(
    image: Image.Image,
) -> tuple[Image.Image, Callable[[float, float], tuple[float, float]]]:
    """The image fitted into a tile, and where a relative (x, y) of it lies there."""
    fitted = ImageOps.contain(image, (TILE, TILE))
    left, top = (TILE - fitted.width) // 2, (TILE - fitted.height) // 2
    tile = Image.new("RGB", (TILE, TILE), (228, 228, 224))
    tile.paste(fitted, (left, top))
    return tile, lambda x, y: (left + x * (fitted.width - 1), top + y * (fitted.height - 1))


def read_sample(dataset: ShardDataset, key: str) -> tuple[Image.Image, Image.Image]:
    """An image as the loader sees it (RGB, oriented) and its stored saliency."""
    row = pc.index(dataset.samples["key"], key).as_py()
    shard = dataset.samples["shard"][row].as_py()
    with (
        dataset.store.open(shard_name(shard, "tar")) as file,
        tarfile.open(fileobj=file) as tar,
    ):
        content = {
            member.name.split(".", 1)[1]: tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name.split(".", 1)[0] == key
        }
    saliency = Image.open(io.BytesIO(content.pop(SALIENCY_MEMBER)))
    image = Image.open(io.BytesIO(next(iter(content.values()))))
    return ImageOps.exif_transpose(image).convert("RGB"), saliency


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
