"""Cut views -> what the encoder is fed: jitter, normalisation, high-pass, masks, fills."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pipeline import devices, filters, photometric, regions
from pipeline.batch import Extra
from pipeline.crop import cut_on_host
from pipeline.fills import FILLS
from pipeline.masks import Masks, draw
from pipeline.memory import Buffers
from pipeline.recipes import Recipe
from pipeline.registry import find
from pipeline.rng import BatchRng, Rng

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation of R, G, B in 0 .. 1, as in torchvision."""

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


def normalised(image: Tensor, recipe: Recipe) -> Tensor:
    """(N, 3, H, W) float32 in 0 .. 1 -> as an encoder of this recipe sees it, high-passed or not.

    Changes `image`.
    """
    for channel, mean, std in zip(image.unbind(1), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return filters.high_pass(image, recipe) if recipe.high_pass else image


def assemble(
    query: View,
    key: View | None,
    recipe: Recipe,
    rng: BatchRng,
    report: frozenset[Extra],
    buffers: Buffers,
) -> dict[str, Any]:
    """The images of a `Batch` and the extras that `report` asks for, by field name.

    On a CPU the images are `buffers`.
    """
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

    size, side = len(query.image), recipe.crop_size
    rows_of = {**dict.fromkeys(cuts, size), "hard_negative": many * size}
    images = {
        name: buffers.empty(rows, side)
        if rng.device.type == "cpu"
        else torch.empty(
            (rows, 3, side, side), device=rng.device, memory_format=torch.channels_last
        )
        for name, rows in rows_of.items()
        if rows
    }

    def put(name: str, rows: slice, image: Tensor, own: Rng) -> None:
        if name in drawn:
            std = recipe.noise_hard_negative if name == "hard_negative" else recipe.noise_query
            content = find("fill", recipe.fill, FILLS)(image, recipe, std, own)
            # a weight of 0 or 1 chooses: on a CPU fifteen times as fast as `where`
            image = torch.lerp(image, content, drawn[name].pixels(rows, side))
        images[name][rows] = image

    def work(rows: slice) -> None:
        fills = partial(rng.stream, "fill", rows=rows)
        put("query", rows, encoder_input(query, looks["query"], rows, recipe), fills(0))
        if key is None:
            return
        image = encoder_input(key, looks["key"], rows, recipe)
        put("key", rows, image, fills(1))
        for copy in range(many):
            at = slice(copy * size + rows.start, copy * size + rows.stop)
            put("hard_negative", at, image, fills(2 + copy))

    if rng.device.type == "cpu":
        list(workers().map(work, parts(size)))
    else:
        work(slice(0, size))
    found: dict[str, Any] = {}
    if boxes is not None:
        found = dict(query_regions=boxes.query, key_regions=boxes.key, region_valid=boxes.valid)
    return images | found | extras(cuts, looks, drawn, side, report)


def parts(size: int) -> list[slice]:
    """The rows of a batch that a CPU works on at a time."""
    return [slice(start, min(start + PART, size)) for start in range(0, size, PART)]


@cache
def workers() -> ThreadPoolExecutor:
    """Threads for the parts of a batch on a CPU, each with one core: they need no barriers."""
    return ThreadPoolExecutor(devices.cpu_threads(), "views", torch.set_num_threads, (1,))


def cut_all(images: list[Tensor], windows: Tensor, side: int) -> Tensor:
    """Cut each image's window on the host: (N, side, side, 3) uint8, planar in memory."""
    cut = torch.empty((len(images), 3, side, side), dtype=torch.uint8)

    def work(rows: slice) -> None:
        for row in range(rows.start, rows.stop):
            cut[row] = cut_on_host(images[row], windows[row], side)

    list(workers().map(work, parts(len(images))))
    return cut.permute(0, 2, 3, 1)


def encoder_input(view: View, look: photometric.Photometric, rows: slice, recipe: Recipe) -> Tensor:
    """These rows of a view, unmasked: (n, 3, H, W) float32."""
    image = photometric.apply(view.image[rows], look.of(rows))
    return normalised(image, recipe)


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
