"""Turn crops into the encoder's input: jitter, blur, normalization, high-pass, masks and fills.

`make_views` has no randomness of its own: it takes parameters and returns tensors. It has three
implementations, which agree up to rounding:

* On a CPU, OpenCV makes the views one by one (`pipeline.cpu_views`). So a view is the same bit for
  bit whatever the batch or the part of it that a thread works on.
* On a GPU, a few compiled kernels process the batch (`pipeline.fused`).
* On a GPU whose machine has no compiler, PyTorch's operators are applied to the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pipeline import cpu_views, fused, photometric
from pipeline.blur import apply_high_pass
from pipeline.compiling import Compiled
from pipeline.devices import to_device
from pipeline.fills import repeat_tile
from pipeline.fused import FUSED_FILLS, MEAN, STD
from pipeline.masks import Masks
from pipeline.photometric import UNCHANGED, Photometric
from pipeline.recipes import Recipe

COMPILER_OPTIONS: dict[str, str | int | bool] = {
    # one kernel per blur axis: by default Inductor writes a sum of that many reads to memory midway
    "realize_acc_reads_threshold": 128,
    "realize_opcount_threshold": 1000,
    # the three channels of a pixel are written by the kernel that computes them
    "max_pointwise_cat_inputs": 0,
}
"""Inductor settings (torch/_inductor/config.py) for `pipeline.fused`."""


@dataclass(frozen=True)
class Masking:
    """The masks and the fill of one copy of N views.

    Attributes:
        masks: masks with N rows, on the device of the views.
        std: standard deviation of the noise, in normalized units.
        noise: (N, 3, cell, cell) float32, standard normal, on the device: the tile of each view,
            which is repeated over its grid. None unless the fill is `noise`.
        content: for any other fill, a function from unmasked images (n, 3, H, W) to the
            content of their masked pixels, broadcastable to them.
    """

    masks: Masks
    std: float
    noise: Tensor | None
    content: Callable[[Tensor], Tensor] | None


def make_views(
    image: Tensor,
    parameters: Photometric,
    maskings: Sequence[Masking | None],
    recipe: Recipe,
    out: Sequence[Tensor] | None = None,
    table: Tensor | None = None,
) -> list[Tensor]:
    """Make all copies of N views for the encoder; the work before masking is done only once.

    Args:
        image: (N, H, W, 3) uint8 crops, on the device where the views are made.
        parameters: photometric parameters of the views, on the host.
        maskings: one per copy; None for a copy without a mask.
        recipe: determines the high-pass filter and the fill.
        out: tensors for the copies, on a CPU only; new ones are allocated if None.
        table: `fused.pack_parameters` of the parameters, if it was called before; for a GPU only.

    Returns:
        One tensor per copy: (N, 3, H, W) float32, normalized, channels_last.
    """
    if image.device.type == "cpu":
        shape = (len(image), 3, *image.shape[1:3])
        allocated = [torch.empty(shape, memory_format=torch.channels_last) for _ in maskings]
        return make_on_cpu(
            image, parameters, maskings, recipe, allocated if out is None else list(out)
        )
    assert out is None, "`out` is for a CPU only"
    if table is None:
        table = fused.pack_parameters(parameters, recipe)
    return make_on_gpu(image, parameters, to_device(table, image.device), maskings, recipe)


def make_on_cpu(
    image: Tensor,
    parameters: Photometric,
    maskings: Sequence[Masking | None],
    recipe: Recipe,
    out: list[Tensor],
) -> list[Tensor]:
    """Make the views one by one (the docstring of this module says why)."""
    views: Iterator[np.ndarray] = (
        cpu_views.make_view(crop, view_parameters, recipe)
        for crop, view_parameters in zip(image.numpy(), parameters.split(), strict=True)
    )
    contents: list[Tensor | None] = [None] * len(maskings)
    if recipe.fill not in FUSED_FILLS:  # a user's fill gets all views at once
        stacked = np.stack(list(views))
        all_views = as_tensor(stacked)
        contents = [
            None
            if masking is None or masking.content is None
            else masking.content(all_views).expand_as(all_views)
            for masking in maskings
        ]
        views = iter(stacked)
    for row, view in enumerate(views):
        for masking, target, content in zip(maskings, out, contents, strict=True):
            copy = target[row].permute(1, 2, 0).numpy()
            if masking is None:
                copy[...] = view
            else:
                own = None if content is None else content[row : row + 1]
                write_masked_on_cpu(view, masking, row, own, copy)
    return out


def write_masked_on_cpu(
    view: np.ndarray, masking: Masking, row: int, content: Tensor | None, out: np.ndarray
) -> None:
    """Write the view of one row with its masked pixels filled; compute the content if it is None.

    Args:
        view, out: (H, W, 3).
    """
    if masking.noise is not None:
        content = masking.noise[row : row + 1] * masking.std
    elif content is None:
        assert masking.content is not None, "the fill has no content"
        content = masking.content(as_tensor(view[None]))
    mask = cpu_views.build_pixel_mask(masking.masks, row, len(view))
    filling = np.ascontiguousarray(content[0].permute(1, 2, 0).numpy())
    cpu_views.write_masked(view, mask, filling, out)


def as_tensor(images: np.ndarray) -> Tensor:
    """Return (N, H, W, 3) as (N, 3, H, W), channels_last, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def make_plain_views(image: Tensor, recipe: Recipe) -> Tensor:
    """Make the encoder's input without augmentation, for evaluations.

    Args:
        image: (N, H, W, 3) uint8 crops, on the device where the views are made.
        recipe: determines the high-pass filter.

    Returns:
        (N, 3, H, W) float32, normalized, channels_last.
    """
    if image.device.type == "cpu":
        views = [cpu_views.make_view(crop, UNCHANGED, recipe) for crop in image.numpy()]
        return as_tensor(np.stack(views))
    return normalize_and_filter_(image.permute(0, 3, 1, 2).float().div_(255), recipe)


def make_on_gpu(
    image: Tensor,
    parameters: Photometric,
    table: Tensor,
    maskings: Sequence[Masking | None],
    recipe: Recipe,
) -> list[Tensor]:
    """Make the views of a batch with the compiled function if possible.

    Args:
        table: the parameters, as `fused.pack_parameters` writes them, on the device.
    """
    is_fused = recipe.fill in FUSED_FILLS
    fused_maskings = [to_fused(masking) for masking in maskings] if is_fused else [None]
    views = get_compiled_chain(recipe).try_call(image, table, fused_maskings)
    if views is not None and is_fused:
        return views
    # a user's fill gets the unmasked views
    view = views[0] if views is not None else make_unmasked(image, parameters, recipe)
    return mask_copies(view, maskings, recipe)


def make_unmasked(image: Tensor, parameters: Photometric, recipe: Recipe) -> Tensor:
    """Make unmasked views with PyTorch's operators: (N, H, W, 3) uint8 -> (N, 3, H, W)."""
    return normalize_and_filter_(photometric.augment_on_gpu(image, parameters), recipe)


def normalize_and_filter_(image: Tensor, recipe: Recipe) -> Tensor:
    """Normalize images in place; return them, or their high-pass if the recipe uses it.

    Args:
        image: (N, 3, H, W) float32 in 0 .. 1.
    """
    for channel, mean, std in zip(image.unbind(1), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return apply_high_pass(image, recipe) if recipe.high_pass else image


@cache
def get_compiled_chain(recipe: Recipe) -> Compiled:
    """Return the compiled function of a recipe's pixels."""
    return Compiled(fused.build_chain(recipe), options=COMPILER_OPTIONS)


def to_fused(masking: Masking | None) -> fused.FusedMasking | None:
    """Convert a masking to the form that the compiled function takes."""
    if masking is None:
        return None
    masks = masking.masks
    return fused.FusedMasking(masks.cells, masks.windows, masks.focal, masking.noise, masking.std)


def mask_copies(view: Tensor, maskings: Sequence[Masking | None], recipe: Recipe) -> list[Tensor]:
    """Return the copies of the views with their masked pixels filled, channels_last."""
    masked_views = []
    for masking in maskings:
        copy = torch.empty_like(view, memory_format=torch.channels_last)
        if masking is None:
            copy.copy_(view)
        else:
            if masking.noise is not None:
                content = repeat_tile(masking.noise * masking.std, recipe)
            else:
                assert masking.content is not None, f"the fill {recipe.fill} has no content"
                content = masking.content(view)
            pixels = masking.masks.to_pixels(view.shape[-1])
            torch.lerp(view, content, pixels, out=copy)  # a weight of 0 or 1 selects
        masked_views.append(copy)
    return masked_views
