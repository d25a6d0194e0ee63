"""Turn crops into the encoder's input: jitter, normalization, high-pass, masks and fills."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline import photometric, regions
from pipeline.batch import Extra
from pipeline.fills import FILLS
from pipeline.fused import FUSED_FILLS, pack_parameters
from pipeline.host_threads import get_threads, split_rows
from pipeline.masks import Masks, Role, draw_masks
from pipeline.pixels import Masking, make_views
from pipeline.recipes import Recipe
from pipeline.registry import find
from pipeline.rng import WORDS_AHEAD, BatchRng, Purpose, Rng, count_normal_words
from schemas import UserError

ViewKind = Literal["query", "key", "hard_negative"]
VIEW_KINDS: tuple[ViewKind, ...] = get_args(ViewKind)
"""Kinds of images in a batch; a sample may have several hard negatives."""


@dataclass(frozen=True)
class View:
    """One cropped view of N samples.

    Attributes:
        image: (N, H, W, 3) uint8.
        saliency: (N, grid, grid) float32, 0 .. 255; None if it is not needed.
        window: crop windows, (N, 4) float32 on the CPU, y0 x0 y1 x1 as fractions of the image;
            x0 > x1 if flipped.
    """

    image: Tensor
    saliency: Tensor | None
    window: Tensor


@dataclass(frozen=True)
class ViewParameters:
    """The photometric parameters of one view of N samples, on the host.

    Attributes:
        photometric: the parameters.
        table: the same, packed for the compiled function (`fused.pack_parameters`); None on a CPU.
    """

    photometric: photometric.Photometric
    table: Tensor | None


class Copy(NamedTuple):
    """One of the images that are made of a crop.

    Attributes:
        number: number of the hard negative among those of its sample; 0 for a query and a key.
    """

    kind: ViewKind
    number: int = 0

    @property
    def fill_stream(self) -> int:
        """The copy number of the random stream of its fill (`BatchRng.stream`)."""
        return VIEW_KINDS.index(self.kind) + self.number


@dataclass(frozen=True)
class ImageInputs:
    """All that determines the images of a batch.

    Attributes:
        crops: the crops `query` and, if there are pairs, `key`.
        parameters: photometric parameters by crop.
        masks: masks of the N rows of each masked copy.
    """

    crops: dict[str, View]
    parameters: dict[str, ViewParameters]
    masks: dict[Copy, Masks]
    recipe: Recipe
    rng: BatchRng


def list_copies(crop: str, recipe: Recipe) -> list[Copy]:
    """Return the copies that are made of the crop `query` or `key`."""
    if crop == "query":
        return [Copy("query")]
    hard_negatives = (Copy("hard_negative", number) for number in range(recipe.hard_negatives))
    return [Copy("key"), *hard_negatives]


def list_masked_copies(recipe: Recipe) -> list[Copy]:
    """Return the copies that get a mask. All others equal their crop's unmasked view."""
    if recipe.fill == "none":
        return []
    masked_kinds = {"hard_negative"} | (
        {"query", "key"} if recipe.branch == "both" else {recipe.branch}
    )
    copies = list_copies("query", recipe) + list_copies("key", recipe)
    return [copy for copy in copies if copy.kind in masked_kinds]


def assemble(
    query: View,
    key: View | None,
    recipe: Recipe,
    rng: BatchRng,
    report: frozenset[Extra],
    parameters: Sequence[ViewParameters] | None = None,
) -> dict[str, Any]:
    """Return the images of a `Batch` and the extras named in `report`, by field name.

    Args:
        key: None if and only if the recipe makes no pairs.
        parameters: result of `draw_parameters`, if it was called ahead.
    """
    crops = {"query": query} if key is None else {"query": query, "key": key}
    if parameters is None:
        parameters = draw_parameters(recipe, rng)
    boxes = None
    if key is not None and recipe.regions:
        region_rng = rng.stream("regions")
        boxes = regions.draw_regions(query.window, key.window, query.saliency, recipe, region_rng)
    masks: dict[Copy, Masks] = {}
    for copy in list_masked_copies(recipe):
        if copy.kind == "query" and recipe.query_mask == "regions":
            assert boxes is not None, "the recipe makes pairs"
            masks[copy] = boxes.to_masks(recipe.crop_size)
        else:
            saliency = require_saliency(query if copy.kind == "query" else key)
            role: Role = "hard_negative" if copy.kind == "hard_negative" else "query"
            masks[copy] = draw_masks(saliency, recipe, role, rng.stream(copy.kind, copy.number))

    by_crop = dict(zip(crops, parameters, strict=True))
    inputs = ImageInputs(crops, by_crop, masks, recipe, rng)
    is_on_cpu = rng.device.type == "cpu"
    images = make_images_on_cpu(inputs) if is_on_cpu else make_images_on_gpu(inputs)
    region_fields: dict[str, Any] = {}
    if boxes is not None:
        region_fields = dict(
            query_regions=boxes.query, key_regions=boxes.key, region_valid=boxes.valid
        )
    return images | region_fields | collect_extras(inputs, report)


def draw_parameters(recipe: Recipe, rng: BatchRng) -> list[ViewParameters]:
    """Draw the photometric parameters of a batch, the query's first.

    The loader calls this in the thread that reads ahead: it takes the host as long as launching
    hundreds of kernels.
    """
    stream, size = rng.stream("photometric"), len(rng.samples)
    drawn = [photometric.draw_photometric(size, recipe, stream) for _ in range(1 + recipe.pair)]
    on_cpu = rng.device.type == "cpu"
    return [ViewParameters(one, None if on_cpu else pack_parameters(one, recipe)) for one in drawn]


def count_words(recipe: Recipe) -> dict[tuple[Purpose, int], int]:
    """Return how many random words `assemble` needs of each stream, so that they are drawn ahead.

    Custom masks and fills may need more and draw those on demand.
    """
    words: dict[tuple[Purpose, int], int] = {("photometric", 0): WORDS_AHEAD}
    if recipe.regions:
        words["regions", 0] = WORDS_AHEAD
    cells = recipe.grid**2 * (3 if recipe.channel_probability > 0 else 1)
    # one mask stream per masked copy; noise uses a fill stream for each as well
    for copy in list_masked_copies(recipe):
        words[copy.kind, copy.number] = cells + WORDS_AHEAD
        if recipe.fill == "noise":
            words["fill", copy.fill_stream] = count_normal_words(3 * recipe.cell**2)
    return words


def make_images_on_cpu(inputs: ImageInputs) -> dict[str, Tensor]:
    """Make the images of a batch by field name, in threads that each work on some of the rows."""
    size, recipe = len(inputs.crops["query"].image), inputs.recipe
    copies = [copy for crop in inputs.crops for copy in list_copies(crop, recipe)]
    images: dict[str, Tensor] = {
        kind: allocate_images(count * size, recipe.crop_size)
        for kind, count in Counter(copy.kind for copy in copies).items()
    }

    def make_rows(rows: slice) -> None:
        for crop in inputs.crops:
            out = [
                images[copy.kind][copy.number * size :][rows] for copy in list_copies(crop, recipe)
            ]
            make_copies(inputs, crop, rows, out)

    list(get_threads().map(make_rows, split_rows(size)))
    return images


def make_images_on_gpu(inputs: ImageInputs) -> dict[str, Tensor]:
    """Make the images of a batch by field name, all rows at once."""
    parts: dict[str, list[Tensor]] = {}
    for crop in inputs.crops:
        views = make_copies(inputs, crop, slice(None))
        for copy, view in zip(list_copies(crop, inputs.recipe), views, strict=True):
            parts.setdefault(copy.kind, []).append(view)
    return {kind: part[0] if len(part) == 1 else torch.cat(part) for kind, part in parts.items()}


def allocate_images(count: int, side: int) -> Tensor:
    """Return (count, 3, side, side) float32 on the CPU, channels_last, not initialized."""
    return torch.empty(count, 3, side, side, memory_format=torch.channels_last)


def make_copies(
    inputs: ImageInputs, crop: str, rows: slice, out: list[Tensor] | None = None
) -> list[Tensor]:
    """Make the copies of some rows of the crop `query` or `key`, in the order of `list_copies`.

    Args:
        out: see `make_views`.
    """
    parameters = inputs.parameters[crop]
    return make_views(
        inputs.crops[crop].image[rows],
        parameters.photometric.select(rows),
        [build_masking(inputs, copy, rows) for copy in list_copies(crop, inputs.recipe)],
        inputs.recipe,
        out,
        None if parameters.table is None else parameters.table[rows],
    )


def build_masking(inputs: ImageInputs, copy: Copy, rows: slice) -> Masking | None:
    """Return the masks and the fill of some rows of a copy, or None if it is not masked."""
    if copy not in inputs.masks:
        return None
    recipe, masks = inputs.recipe, inputs.masks[copy].select(rows)
    std = recipe.noise_hard_negative if copy.kind == "hard_negative" else recipe.noise_query
    rng = inputs.rng.stream("fill", copy.fill_stream, rows)
    if recipe.fill == "noise":
        noise = rng.normal(len(masks.ratio), 3, recipe.cell, recipe.cell)
        return Masking(masks, std, noise, None)
    return Masking(masks, std, None, partial(compute_content, recipe, std, rng))


def compute_content(recipe: Recipe, std: float, rng: Rng, image: Tensor) -> Tensor:
    """Return the recipe's fill of unmasked (N, 3, H, W) images, float32, broadcastable to them.

    Raises:
        UserError: the content of a user's fill is not broadcastable to the images.
    """
    function = find("fill", recipe.fill, FILLS)
    if recipe.fill in FUSED_FILLS:
        return function(image, recipe, std, rng)
    # a user's function may work in place or in float64
    content = function(image.clone(), recipe, std, rng)
    try:
        content.expand_as(image)
    except RuntimeError as error:
        raise UserError(
            f"fill {recipe.fill!r}: it returned content of shape {tuple(content.shape)}, which is "
            f"not broadcastable to the views {tuple(image.shape)}"
        ) from error
    return content.float()


def require_saliency(view: View | None) -> Tensor:
    """Return the saliency from which masks are drawn; the graph provides it if there are masks."""
    assert view is not None
    assert view.saliency is not None
    return view.saliency


def collect_extras(inputs: ImageInputs, report: frozenset[Extra]) -> dict[str, Any]:
    """Return the extras named in `report`, by their field names in `Batch`."""
    extras: dict[str, Any] = {}
    for kind in VIEW_KINDS if "masks" in report else ():
        kind_masks = [masks for copy, masks in inputs.masks.items() if copy.kind == kind]
        if kind_masks:
            masks = Masks.concatenate(kind_masks)
            pixels = masks.to_pixels(inputs.recipe.crop_size).bool()
            pixels = pixels.expand(-1, 3, -1, -1)
            extras |= {
                f"{kind}_mask": pixels.contiguous(memory_format=torch.channels_last),
                f"{kind}_ratio": masks.ratio,
                f"{kind}_focal": masks.focal,
            }
    for name, view in inputs.crops.items():
        if "saliency" in report and view.saliency is not None:
            extras[f"{name}_saliency"] = view.saliency.clone()
        if "windows" in report:
            extras[f"{name}_window"] = view.window.clone()
        if "crops" in report:
            extras[f"{name}_crop"] = view.image.permute(0, 3, 1, 2).clone()
        if "photometric" in report:
            extras[f"{name}_photometric"] = inputs.parameters[name].photometric
    return extras
