"""Cut views -> what the encoder is fed: jitter, normalisation, high-pass, masks, fills."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline import devices, photometric, regions
from pipeline.batch import Extra
from pipeline.crop import crop_on_host
from pipeline.fills import FILLS
from pipeline.masks import Masks, draw
from pipeline.pixels import Masking, make_views
from pipeline.recipes import Recipe
from pipeline.registry import find
from pipeline.rng import BatchRng

COPIES = ("query", "key", "hard_negative")
"""Names of what a batch has of each sample; there may be several hard negatives."""

PART = 8
"""Views that a CPU works on at a time: 5 MB at 224 pixels, which stays in its caches."""


@dataclass(frozen=True)
class View:
    """One view of N samples as the graph cuts it.

    Attributes:
        image: (N, H, W, 3) uint8.
        saliency: (N, grid, grid) float32, 0 .. 255; None where nobody asks for it.
        window: (N, 4) float32 on the CPU, y0 x0 y1 x1 as shares of the image.
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
    """Return the images of a `Batch` and the extras that `report` asks for, by field name."""
    cuts = {"query": query} if key is None else {"query": query, "key": key}
    colors = rng.stream("photometric")
    looks = {name: photometric.draw(len(view.image), recipe, colors) for name, view in cuts.items()}
    many = recipe.hard_negatives
    drawn: dict[str, Masks] = {}
    boxes = None
    if key is not None and recipe.regions:
        own = rng.stream("regions")
        boxes = regions.draw(query.window, key.window, query.saliency, recipe, own)
    if recipe.fill != "none":
        if boxes is not None and recipe.query_mask == "regions":
            drawn["query"] = boxes.masks(recipe.crop_size)
        elif recipe.branch != "key":
            drawn["query"] = draw(guide(query), recipe, "query", rng.stream("query"))
        if key is not None and recipe.branch != "query":
            drawn["key"] = draw(guide(key), recipe, "query", rng.stream("key"))
        if key is not None and many:
            copies = [
                draw(guide(key), recipe, "hard_negative", rng.stream("hard_negative", copy))
                for copy in range(many)
            ]
            drawn["hard_negative"] = Masks.concatenate(copies)

    side = recipe.crop_size
    images = make_all(cuts, looks, drawn, recipe, rng)
    found: dict[str, Any] = {}
    if boxes is not None:
        found = dict(query_regions=boxes.query, key_regions=boxes.key, region_valid=boxes.valid)
    return images | found | extras(cuts, looks, drawn, side, report)


def empty(count: int, side: int) -> Tensor:
    """Return (count, 3, side, side) float32 on the CPU, channels_last, not initialized."""
    return torch.empty(count, 3, side, side, memory_format=torch.channels_last)


def make_all(
    cuts: dict[str, View],
    looks: dict[str, photometric.Photometric],
    drawn: dict[str, Masks],
    recipe: Recipe,
    rng: BatchRng,
) -> dict[str, Tensor]:
    """Make the images of a batch by their names in `Batch`."""
    size, many = len(cuts["query"].image), recipe.hard_negatives
    on_cpu = rng.device.type == "cpu"
    images = {}
    if on_cpu:
        rows_of = {**dict.fromkeys(cuts, size), "hard_negative": many * size}
        images = {name: empty(rows, recipe.crop_size) for name, rows in rows_of.items() if rows}

    def masking(copy: int, rows: slice) -> Masking | None:
        """Of query (0), key (1) or a hard negative (2, 3, ...)."""
        name = COPIES[min(copy, 2)]
        if name not in drawn:
            return None
        std = recipe.noise_hard_negative if name == "hard_negative" else recipe.noise_query
        masks = drawn[name].of(place(copy, rows))
        own = rng.stream("fill", copy, rows)
        if recipe.fill == "noise":
            noise = own.normal(rows.stop - rows.start, 3, recipe.cell, recipe.cell)
            return Masking(masks, std, noise, None)
        function = find("fill", recipe.fill, FILLS)
        return Masking(masks, std, None, lambda image: function(image, recipe, std, own))

    def place(copy: int, rows: slice) -> slice:
        """Return the rows of a copy among all images of its name."""
        first = max(0, copy - 2) * size
        return slice(first + rows.start, first + rows.stop)

    def work(rows: slice) -> dict[str, list[Tensor]]:
        made: dict[str, list[Tensor]] = {}
        for name, view in cuts.items():
            copies = [0] if name == "query" else [1, *range(2, 2 + many)]
            names = [COPIES[min(copy, 2)] for copy in copies]
            found = make_views(
                view.image[rows],
                looks[name].of(rows),
                [masking(copy, rows) for copy in copies],
                recipe,
                [images[own][place(copy, rows)] for own, copy in zip(names, copies, strict=True)]
                if on_cpu
                else None,
            )
            for own, one in zip(names, found, strict=True):
                made.setdefault(own, []).append(one)
        return made

    if on_cpu:
        list(workers().map(work, parts(size)))
        return images
    made = work(slice(0, size))
    return {name: one[0] if len(one) == 1 else torch.cat(one) for name, one in made.items()}


def parts(size: int) -> list[slice]:
    """The rows of a batch that a CPU works on at a time."""
    return [slice(start, min(start + PART, size)) for start in range(0, size, PART)]


@cache
def workers() -> ThreadPoolExecutor:
    """Threads for the parts of a batch on a CPU, each with one core: they need no barriers."""
    return ThreadPoolExecutor(devices.count_cpu_threads(), "views", torch.set_num_threads, (1,))


def cut_all(images: list[Tensor], windows: Tensor, recipe: Recipe) -> Tensor:
    """Cut each image's window on the host: (N, side, side, 3) uint8, planar in memory."""
    side = recipe.crop_size
    cut = torch.empty((len(images), 3, side, side), dtype=torch.uint8)

    def work(rows: slice) -> None:
        for row in range(rows.start, rows.stop):
            cut[row] = crop_on_host(images[row], windows[row], side, recipe.interpolation)

    list(workers().map(work, parts(len(images))))
    return cut.permute(0, 2, 3, 1)


def guide(view: View) -> Tensor:
    """The saliency that masks are drawn from; the graph hands it out where there are masks."""
    assert view.saliency is not None
    return view.saliency


def extras(
    cuts: dict[str, View],
    looks: dict[str, photometric.Photometric],
    drawn: dict[str, Masks],
    side: int,
    report: frozenset[Extra],
) -> dict[str, Any]:
    """What `report` asks for, by the names of `Batch`."""
    found: dict[str, Any] = {}
    if "masks" in report:
        for name, masks in drawn.items():
            pixels = masks.pixels(slice(None), side).bool().expand(-1, 3, -1, -1)
            found |= {
                f"{name}_mask": pixels.contiguous(memory_format=torch.channels_last),
                f"{name}_ratio": masks.ratio,
                f"{name}_focal": masks.focal,
            }
    for name, view in cuts.items():
        if "saliency" in report and view.saliency is not None:
            found[f"{name}_saliency"] = view.saliency.clone()
        if "windows" in report:
            found[f"{name}_window"] = view.window.clone()
        if "crops" in report:
            found[f"{name}_crop"] = view.image.permute(0, 3, 1, 2).clone()
        if "photometric" in report:
            found[f"{name}_photometric"] = looks[name]
    return found
