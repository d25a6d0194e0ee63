"""Turn crops into the encoder's input: jitter, normalization, high-pass, masks and fills."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline import photometric, regions
from pipeline.batch import Extra
from pipeline.fills import FILLS
from pipeline.fused import FUSED_FILLS
from pipeline.host_threads import get_threads, split_rows
from pipeline.masks import Masks, draw_masks
from pipeline.pixels import Masking, make_views
from pipeline.recipes import Recipe
from pipeline.registry import find
from pipeline.rng import WORDS_AHEAD, BatchRng, Purpose, Rng, count_normal_words

VIEW_KINDS = ("query", "key", "hard_negative")
"""Kinds of views in a batch; a sample may have several hard negatives."""


@dataclass(frozen=True)
class View:
    """One cropped view of N samples.

    Attributes:
        image: (N, H, W, 3) uint8.
        saliency: (N, grid, grid) float32, 0 .. 255; None if it is not needed.
        window: (N, 4) float32 on the CPU, y0 x0 y1 x1 as fractions of the image; x0 > x1 if
            flipped.
    """

    image: Tensor
    saliency: Tensor | None
    window: Tensor


def assemble(
    query: View,
    key: View | None,
    recipe: Recipe,
    rng: BatchRng,
    report: frozenset[Extra],
) -> dict[str, Any]:
    """Return the images of a `Batch` and the extras named in `report`, by field name."""
    crops = {"query": query} if key is None else {"query": query, "key": key}
    photometric_rng = rng.stream("photometric")
    parameters = {
        name: photometric.draw_photometric(len(view.image), recipe, photometric_rng)
        for name, view in crops.items()
    }
    masks: dict[str, Masks] = {}
    boxes = None
    if key is not None and recipe.regions:
        region_rng = rng.stream("regions")
        boxes = regions.draw_regions(query.window, key.window, query.saliency, recipe, region_rng)
    if recipe.fill != "none":
        if boxes is not None and recipe.query_mask == "regions":
            masks["query"] = boxes.to_masks(recipe.crop_size)
        elif recipe.branch != "key":
            masks["query"] = draw_masks(
                require_saliency(query), recipe, "query", rng.stream("query")
            )
        if key is not None and recipe.branch != "query":
            masks["key"] = draw_masks(require_saliency(key), recipe, "query", rng.stream("key"))
        if key is not None and recipe.hard_negatives:
            masks["hard_negative"] = Masks.concatenate(
                [
                    draw_masks(
                        require_saliency(key),
                        recipe,
                        "hard_negative",
                        rng.stream("hard_negative", number),
                    )
                    for number in range(recipe.hard_negatives)
                ]
            )

    images = make_images(crops, parameters, masks, recipe, rng)
    region_fields: dict[str, Any] = {}
    if boxes is not None:
        region_fields = dict(
            query_regions=boxes.query, key_regions=boxes.key, region_valid=boxes.valid
        )
    extras = collect_extras(crops, parameters, masks, recipe.crop_size, report)
    return images | region_fields | extras


def count_words(recipe: Recipe) -> dict[tuple[Purpose, int], int]:
    """Return how many random words `assemble` needs of each stream, so that they are drawn ahead.

    Custom masks and fills may need more and draw those on demand.
    """
    words: dict[tuple[Purpose, int], int] = {("photometric", 0): WORDS_AHEAD}
    if recipe.regions:
        words["regions", 0] = WORDS_AHEAD
    if recipe.fill == "none":
        return words
    cells = recipe.grid**2 * (3 if recipe.channel_probability > 0 else 1)
    streams: list[tuple[Purpose, int]] = []  # of the masks; the fill has one for each, too
    if recipe.branch != "key":
        streams.append(("query", 0))
    if recipe.branch != "query":
        streams.append(("key", 0))
    streams += [("hard_negative", number) for number in range(recipe.hard_negatives)]
    for name, number in streams:
        words[name, number] = cells + WORDS_AHEAD
        if recipe.fill == "noise":
            words["fill", VIEW_KINDS.index(name) + number] = count_normal_words(3 * recipe.cell**2)
    return words


def allocate_images(count: int, side: int) -> Tensor:
    """Return (count, 3, side, side) float32 on the CPU, channels_last, not initialized."""
    return torch.empty(count, 3, side, side, memory_format=torch.channels_last)


def make_images(
    crops: dict[str, View],
    parameters: dict[str, photometric.Photometric],
    masks: dict[str, Masks],
    recipe: Recipe,
    rng: BatchRng,
) -> dict[str, Tensor]:
    """Make the images of a batch, by their field names in `Batch`."""
    size, hard_negatives = len(crops["query"].image), recipe.hard_negatives
    on_cpu = rng.device.type == "cpu"
    images = {}
    if on_cpu:
        rows_of = {**dict.fromkeys(crops, size), "hard_negative": hard_negatives * size}
        side = recipe.crop_size
        images = {kind: allocate_images(rows, side) for kind, rows in rows_of.items() if rows}

    def build_masking(copy: int, rows: slice) -> Masking | None:
        """Return the masking of the query (0), the key (1) or a hard negative (2, 3, ...)."""
        name = VIEW_KINDS[min(copy, 2)]
        if name not in masks:
            return None
        std = recipe.noise_hard_negative if name == "hard_negative" else recipe.noise_query
        selected = masks[name].select(locate(copy, rows))
        fill_rng = rng.stream("fill", copy, rows)
        if recipe.fill == "noise":
            noise = fill_rng.normal(rows.stop - rows.start, 3, recipe.cell, recipe.cell)
            return Masking(selected, std, noise, None)
        return Masking(selected, std, None, partial(compute_content, recipe, std, fill_rng))

    def locate(copy: int, rows: slice) -> slice:
        """Return the rows of a copy among all images of its kind."""
        first = max(0, copy - 2) * size
        return slice(first + rows.start, first + rows.stop)

    def make_rows(rows: slice) -> dict[str, list[Tensor]]:
        """Make the images of some rows, by kind."""
        row_images: dict[str, list[Tensor]] = {}
        for name, view in crops.items():
            copies = [0] if name == "query" else [1, *range(2, 2 + hard_negatives)]
            names = [VIEW_KINDS[min(copy, 2)] for copy in copies]
            views = make_views(
                view.image[rows],
                parameters[name].select(rows),
                [build_masking(copy, rows) for copy in copies],
                recipe,
                [images[kind][locate(copy, rows)] for kind, copy in zip(names, copies, strict=True)]
                if on_cpu
                else None,
            )
            for kind, image in zip(names, views, strict=True):
                row_images.setdefault(kind, []).append(image)
        return row_images

    if on_cpu:
        list(get_threads().map(make_rows, split_rows(size)))
        return images
    parts = make_rows(slice(0, size))
    return {kind: part[0] if len(part) == 1 else torch.cat(part) for kind, part in parts.items()}


def compute_content(recipe: Recipe, std: float, rng: Rng, image: Tensor) -> Tensor:
    """Return the recipe's fill of unmasked (N, 3, H, W) images, float32, broadcastable to them."""
    function = find("fill", recipe.fill, FILLS)
    if recipe.fill in FUSED_FILLS:
        return function(image, recipe, std, rng)
    # a user's function may work in place or in float64
    return function(image.clone(), recipe, std, rng).float()


def require_saliency(view: View) -> Tensor:
    """Return the saliency from which masks are drawn; the graph provides it if there are masks."""
    assert view.saliency is not None
    return view.saliency


def collect_extras(
    crops: dict[str, View],
    parameters: dict[str, photometric.Photometric],
    masks: dict[str, Masks],
    side: int,
    report: frozenset[Extra],
) -> dict[str, Any]:
    """Return the extras named in `report`, by their field names in `Batch`."""
    extras: dict[str, Any] = {}
    if "masks" in report:
        for name, mask in masks.items():
            pixels = mask.to_pixels(slice(None), side).bool().expand(-1, 3, -1, -1)
            extras |= {
                f"{name}_mask": pixels.contiguous(memory_format=torch.channels_last),
                f"{name}_ratio": mask.ratio,
                f"{name}_focal": mask.focal,
            }
    for name, view in crops.items():
        if "saliency" in report and view.saliency is not None:
            extras[f"{name}_saliency"] = view.saliency.clone()
        if "windows" in report:
            extras[f"{name}_window"] = view.window.clone()
        if "crops" in report:
            extras[f"{name}_crop"] = view.image.permute(0, 3, 1, 2).clone()
        if "photometric" in report:
            extras[f"{name}_photometric"] = parameters[name]
    return extras
