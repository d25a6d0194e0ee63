"""What the encoder is fed, for a person to look at: one row a sample, as PNG and as HTML."""

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from pipeline import masks
from pipeline.batch import Batch
from pipeline.fused import MEAN, STD
from pipeline.loader import MaskedViews
from pipeline.recipes import Recipe
from pipeline.sheet import KEY, QUERY, TILE, Tile, fit_into_tile, page, png
from schemas import ShardDataset, UserError
from schemas.sample import SALIENCY_MEMBER
from schemas.tables import shard_name

FOREGROUND = (255, 214, 10)
INK = (30, 30, 30)
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
    """Write the first samples that a training run with this seed would see.

    Args:
        out: the PNG; a page of the same name that ends in .html lies beside it.

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
        report=("masks", "saliency", "windows", "crops", "keys"),
    )
    batch = next(iter(views))
    rows = [sample_row(dataset, batch, place, recipe) for place in range(views.batch_size)]
    title, note = heading(dataset, recipe)
    try:
        png(title, note, rows).save(out, format="PNG")
        out.with_suffix(".html").write_text(page(title, note, rows))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return views.batch_size


def sheet_of_fed(
    batch: Batch, recipe: Recipe, shown: Mapping[str, Tensor], samples: int = 4
) -> Image.Image:
    """The first views of a batch as the network is fed them, one row a sample.

    Args:
        shown: further pictures by their name, (N, 1 or 3, H, W) in 0 .. 1.
    """
    names = [name for name in ("query", "key") if getattr(batch, name) is not None]
    rows = []
    for place in range(min(samples, len(batch.query))):
        tiles = [
            Tile(name, view_tile(getattr(batch, name)[place], recipe), "", name) for name in names
        ]
        if batch.hard_negative is not None:
            tiles += [
                Tile("hard negative", view_tile(view, recipe), "")
                for view in batch.hard_negative[place :: len(batch.query)]
            ]
        tiles += [
            Tile(name, picture(images[place].expand(3, -1, -1)), "")
            for name, images in shown.items()
        ]
        rows.append(tiles)
    return png("as fed", "High-pass views are shown about middle gray." * recipe.high_pass, rows)


def heading(dataset: ShardDataset, recipe: Recipe) -> tuple[str, str]:
    title = f"{dataset.card.name}: fill {recipe.fill}, crop {recipe.crop_size}"
    note = "crop: cut, before any change."
    if guided(recipe):
        margin = f"A >= mean - {recipe.foreground_margin:g} std"
        note += (
            f" Dots and lines: its foreground, {margin} on its own {recipe.grid} x {recipe.grid}."
        )
    if recipe.high_pass:
        note += " High-pass views are shown about middle gray."
    return title, note


def guided(recipe: Recipe) -> bool:
    """Whether any mask of the recipe may look at the saliency."""
    names = {recipe.query_mask} | ({recipe.hard_negative_mask} if recipe.hard_negatives else set())
    return recipe.fill != "none" and not names <= {"random", "block"}


def sample_row(dataset: ShardDataset, batch: Batch, place: int, recipe: Recipe) -> list[Tile]:
    """The tiles of one sample."""
    assert batch.sample_keys is not None
    key = batch.sample_keys[place]
    image, saliency = read_sample(dataset, key)
    whole, place_of = letterboxed(image)
    draw = ImageDraw.Draw(whole)
    branches = {"query": QUERY, "key": KEY} if recipe.pair else {"query": QUERY}
    for branch, colour in branches.items():
        window = getattr(batch, f"{branch}_window")
        y0, x0, y1, x1 = window[place].tolist()
        corners = place_of(min(x0, x1), y0), place_of(max(x0, x1), y1)
        draw.rectangle((*corners[0], *corners[1]), outline=colour, width=3)
    label = int(batch.label[place])
    name = dataset.classes[label] if 0 <= label < len(dataset.classes) else "no label"

    tiles = [
        Tile("image and windows", whole, shortened(key, 30)),
        Tile(
            "saliency",
            letterboxed(overlaid(fit_into_tile(image), saliency))[0],
            shortened(name, 30),
        ),
    ]
    for branch in branches:
        crop, front = crop_tile(batch, branch, place, recipe)
        view = view_tile(getattr(batch, branch)[place], recipe)
        tiles.append(Tile(f"{branch}: crop", crop, front, branch))
        tiles.append(Tile(f"{branch}, as fed", view, caption(batch, branch, place), branch))
    for number in range(recipe.hard_negatives):
        assert batch.hard_negative is not None
        row = number * len(batch.query) + place
        view = view_tile(batch.hard_negative[row], recipe)
        tiles.append(Tile("hard negative, as fed", view, caption(batch, "hard_negative", row)))
    return tiles


def caption(batch: Batch, name: str, row: int) -> str:
    """What was drawn for one view, and how much of it is filled."""
    mask = getattr(batch, f"{name}_mask")
    if mask is None:
        return "not masked"
    filled = f"{float(mask[row].float().mean()):.0%} filled"
    if getattr(batch, f"{name}_focal")[row]:
        return f"window; {filled}"
    return f"ratio {float(getattr(batch, f'{name}_ratio')[row]):.2f}; {filled}"


def crop_tile(batch: Batch, branch: str, place: int, recipe: Recipe) -> tuple[Image.Image, str]:
    """A view as it was cut, its foreground cells outlined, and how many they are."""
    pixels = getattr(batch, f"{branch}_crop")[place].permute(1, 2, 0).cpu().numpy()
    tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)
    if not guided(recipe):
        return tile, ""
    saliency = getattr(batch, f"{branch}_saliency")[place]
    front = masks.foreground(saliency.unsqueeze(0), recipe.foreground_margin)[0].cpu().numpy()
    outline(tile, front)
    return tile, f"foreground {front.sum()} of {front.size} cells"


def view_tile(view: Tensor, recipe: Recipe) -> Image.Image:
    """A normalised (3, H, W) view as an image."""
    values = view.cpu().permute(1, 2, 0).numpy()
    if recipe.high_pass:
        shown = 0.5 + HIGH_PASS_CONTRAST * values
    else:
        shown = values * np.array(STD) + np.array(MEAN)
    return picture(torch.from_numpy(shown).permute(2, 0, 1))


def picture(values: Tensor) -> Image.Image:
    """(3, H, W) in 0 .. 1 as a tile's image."""
    pixels = (255 * values.cpu().permute(1, 2, 0).numpy().clip(0, 1)).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC)


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
    fitted = fit_into_tile(image)
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
    with any_size():
        image = Image.open(io.BytesIO(next(iter(content.values()))))
        return ImageOps.exif_transpose(image).convert("RGB"), saliency


@contextmanager
def any_size() -> Iterator[None]:
    """Lift Pillow's limit for pictures of the dataset, which the loader decodes whole anyway."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
