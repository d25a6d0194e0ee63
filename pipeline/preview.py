"""Contact sheets of the encoder's inputs: one row per sample, as PNG and HTML."""

import io
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from pipeline import masks
from pipeline.batch import Batch
from pipeline.contact_sheet import (
    INK,
    KEY,
    QUERY,
    TILE,
    Tile,
    draw_png,
    fit_into_tile,
    fit_letterbox,
    render_html,
)
from pipeline.failures import without_size_limit
from pipeline.fused import MEAN, STD
from pipeline.loader import MaskedViews
from pipeline.recipes import Recipe
from pipeline.shards import ShardReader, open_source
from schemas import ShardDataset, UserError

FOREGROUND = (255, 214, 10)
HIGH_PASS_CONTRAST = 0.5
"""Brightness (0 .. 1) per normalized unit of high-pass images, shown around middle gray."""
BATCH_ROWS = 4
"""Maximum number of rows of `draw_batch_sheet`."""


def write_preview(
    url: str | Path,
    recipe: Recipe,
    out: Path,
    samples: int = 12,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Write a contact sheet of the first samples of a training run with this seed.

    Args:
        out: PNG file to write; an HTML page with the suffix .html is written beside it.

    Returns:
        The number of rows: `samples`, or the size of the dataset if that is smaller.

    Raises:
        UserError: `MaskedViews` raises it, `samples` is below 1, or `out` has the suffix .html or
            cannot be written.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    if out.suffix == ".html":
        raise UserError(
            f"{out}: give the name of the picture, {out.with_suffix('.png')}; its page has the "
            "same name"
        )
    dataset = ShardDataset.open(url)
    views = MaskedViews(
        url,
        recipe,
        batch_size=max(1, min(samples, len(dataset))),
        device=device,
        seed=seed,
        report=("masks", "saliency", "windows", "crops", "keys"),
    )
    with closing(views):
        batch = next(iter(views))
    with closing(ShardReader(dataset, open_source(dataset, None), views.order)) as reader:
        encoded = reader.read(epoch=0, step=0)
    rows = [
        draw_sample_row(dataset, batch, row, recipe, decode_sample(*stored))
        for row, stored in enumerate(zip(encoded.images, encoded.maps, strict=True))
    ]
    title, note = describe_sheet(dataset, recipe)
    try:
        draw_png(title, note, rows).save(out, format="PNG")
        out.with_suffix(".html").write_text(render_html(title, note, rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return views.batch_size


def draw_batch_sheet(batch: Batch, recipe: Recipe, pictures: Mapping[str, Tensor]) -> Image.Image:
    """Draw the first views of a batch as the network receives them, one row per sample.

    Args:
        pictures: additional pictures by name, (N, 1 or 3, H, W) in 0 .. 1.
    """
    names = [name for name in ("query", "key") if getattr(batch, name) is not None]
    rows = []
    for row in range(min(BATCH_ROWS, len(batch.query))):
        tiles = [
            Tile(name, draw_view(getattr(batch, name)[row], recipe), "", name) for name in names
        ]
        if batch.hard_negative is not None:
            tiles += [
                Tile("hard negative", draw_view(view, recipe), "")
                for view in batch.hard_negative[row :: len(batch.query)]
            ]
        tiles += [
            Tile(name, to_picture(images[row].expand(3, -1, -1)), "")
            for name, images in pictures.items()
        ]
        rows.append(tiles)
    return draw_png(
        "network input", "High-pass views are shown around middle gray." * recipe.high_pass, rows
    )


def describe_sheet(dataset: ShardDataset, recipe: Recipe) -> tuple[str, str]:
    """Return the title of a contact sheet and a note that explains its pictures."""
    title = f"{dataset.title}: fill {recipe.fill}, crop {recipe.crop_size}"
    note = "crop: before any augmentation."
    if masks_depend_on_saliency(recipe):
        margin = f"A >= mean - {recipe.foreground_margin:g} std"
        note += (
            f" Dots and outlines mark its foreground cells, {margin} on its {recipe.grid} x "
            f"{recipe.grid} grid."
        )
    if recipe.high_pass:
        note += " High-pass views are shown around middle gray."
    return title, note


def masks_depend_on_saliency(recipe: Recipe) -> bool:
    """Return whether any mask of the recipe may depend on the saliency."""
    names = {recipe.query_mask} | ({recipe.hard_negative_mask} if recipe.hard_negatives else set())
    independent = {"random", "block"} | ({"regions"} if recipe.region_choice == "random" else set())
    return recipe.fill != "none" and not names <= independent


def draw_sample_row(
    dataset: ShardDataset,
    batch: Batch,
    row: int,
    recipe: Recipe,
    stored: tuple[Image.Image, Image.Image],
) -> list[Tile]:
    """Return the tiles of one sample.

    Args:
        stored: its image and its saliency, as `decode_sample` returns them.
    """
    assert batch.sample_keys is not None
    key = batch.sample_keys[row]
    image, saliency = stored
    thumbnail, to_tile = fit_letterbox(image)
    draw = ImageDraw.Draw(thumbnail)
    branches = {"query": QUERY, "key": KEY} if recipe.pair else {"query": QUERY}
    for branch, color in branches.items():
        window = getattr(batch, f"{branch}_window")
        y0, x0, y1, x1 = window[row].tolist()
        corners = to_tile(min(x0, x1), y0), to_tile(max(x0, x1), y1)
        draw.rectangle((*corners[0], *corners[1]), outline=color, width=3)
    label = int(batch.label[row])
    name = dataset.classes[label] if 0 <= label < len(dataset.classes) else "no label"

    tiles = [
        Tile("image and windows", thumbnail, shorten(key, 30)),
        Tile(
            "saliency",
            fit_letterbox(overlay_saliency(fit_into_tile(image), saliency))[0],
            shorten(name, 30),
        ),
    ]
    for branch in branches:
        crop, foreground = draw_crop(batch, branch, row, recipe)
        view = draw_view(getattr(batch, branch)[row], recipe)
        tiles.append(Tile(f"{branch}: crop", crop, foreground, branch))
        caption = describe_mask(batch, branch, row)
        tiles.append(Tile(f"{branch}: network input", view, caption, branch))
    for number in range(recipe.hard_negatives):
        assert batch.hard_negative is not None
        negative_row = number * len(batch.query) + row
        view = draw_view(batch.hard_negative[negative_row], recipe)
        caption = describe_mask(batch, "hard_negative", negative_row)
        tiles.append(Tile("hard negative: network input", view, caption))
    return tiles


def describe_mask(batch: Batch, name: str, row: int) -> str:
    """Describe the mask of one view, and how much of the view it fills."""
    mask = getattr(batch, f"{name}_mask")
    if mask is None:
        return "not masked"
    filled = f"{float(mask[row].float().mean()):.0%} filled"
    if getattr(batch, f"{name}_focal")[row]:
        return f"focal window; {filled}"
    return f"ratio {float(getattr(batch, f'{name}_ratio')[row]):.2f}; {filled}"


def draw_crop(batch: Batch, branch: str, row: int, recipe: Recipe) -> tuple[Image.Image, str]:
    """Return a crop with its foreground cells outlined, and a caption with their number."""
    pixels = getattr(batch, f"{branch}_crop")[row].permute(1, 2, 0).cpu().numpy()
    tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
    if not masks_depend_on_saliency(recipe):
        return tile, ""
    saliency = getattr(batch, f"{branch}_saliency")[row]
    foreground = masks.find_foreground(saliency.unsqueeze(0), recipe.foreground_margin)[0]
    is_foreground = foreground.cpu().numpy()
    outline_foreground_(tile, is_foreground)
    return tile, f"foreground {is_foreground.sum()} of {is_foreground.size} cells"


def draw_view(view: Tensor, recipe: Recipe) -> Image.Image:
    """Convert a normalized (3, H, W) view to a picture of a tile."""
    values = view.cpu().permute(1, 2, 0).numpy()
    if recipe.high_pass:
        pixels = 0.5 + HIGH_PASS_CONTRAST * values
    else:
        pixels = values * np.array(STD) + np.array(MEAN)
    return to_picture(torch.from_numpy(pixels).permute(2, 0, 1))


def to_picture(values: Tensor) -> Image.Image:
    """Convert (3, H, W) in 0 .. 1 to a picture of a tile."""
    pixels = (255 * values.cpu().permute(1, 2, 0).numpy().clip(0, 1)).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)


def outline_foreground_(tile: Image.Image, is_foreground: np.ndarray) -> None:
    """Draw a border around the foreground cells and a dot in each of them, in place.

    Args:
        is_foreground: (grid, grid) bool.
    """
    draw = ImageDraw.Draw(tile)
    side = len(is_foreground)
    cell = TILE / side
    padded = np.pad(is_foreground, 1)
    for row, column in zip(*is_foreground.nonzero(), strict=True):
        middle = ((column + 0.5) * cell, (row + 0.5) * cell)
        draw.circle(middle, 2.5, fill=FOREGROUND, outline=INK)
    for line in range(side + 1):
        edge = min(round(line * cell), TILE - 1)
        for cell_index in range(side):
            start, end = round(cell_index * cell), round((cell_index + 1) * cell)
            if padded[line, cell_index + 1] != padded[line + 1, cell_index + 1]:
                draw.line((start, edge, end, edge), fill=FOREGROUND, width=2)
            if padded[cell_index + 1, line] != padded[cell_index + 1, line + 1]:
                draw.line((edge, start, edge, end), fill=FOREGROUND, width=2)


def overlay_saliency(image: Image.Image, saliency: Image.Image) -> Image.Image:
    """Return the image in gray with the saliency as a red tint."""
    heat = np.asarray(saliency.resize(image.size, Image.Resampling.BICUBIC), np.float32) / 255
    gray = np.asarray(image.convert("L"), np.float32)[..., None]
    weight = 0.75 * heat[..., None]
    tinted = (1 - weight) * gray + weight * np.array([255, 40, 0], np.float32)
    return Image.fromarray(tinted.round().astype(np.uint8))


def decode_sample(
    encoded_image: np.ndarray, encoded_map: np.ndarray
) -> tuple[Image.Image, Image.Image]:
    """Return an image as the loader sees it (RGB, oriented) and its stored saliency.

    Args:
        encoded_image, encoded_map: (bytes,) uint8, the content of the files.
    """
    saliency = Image.open(io.BytesIO(encoded_map.tobytes()))
    with without_size_limit():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded_image.tobytes())))
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255, not scale them
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return image.convert("RGB"), saliency


def shorten(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
