"""Cut views -> what the encoder sees: jitter, blur, normalization, high-pass, masks and fills.

`make_views` draws nothing: parameters in, tensors out. It runs in one of three ways that agree to
rounding:

* on a CPU image by image with PyTorch's own operators, so that a view is the same bit for bit
  whatever the batch and the part of it that a thread works on: the last elements of a tensor, which
  do not fill a vector register, may be rounded differently from the others;
* on a GPU as a few compiled kernels (`pipeline.fused`);
* on a GPU whose machine has no compiler, with PyTorch's own operators on the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pipeline import fused, photometric
from pipeline.blur import high_pass
from pipeline.compiling import Compiled
from pipeline.devices import to_device
from pipeline.fills import repeat_tile
from pipeline.fused import FUSED_FILLS, MEAN, STD
from pipeline.masks import Masks
from pipeline.photometric import Photometric
from pipeline.recipes import Recipe

COMPILER_OPTIONS: dict[str, str | int | bool] = {
    # one kernel per blur axis: by default Inductor writes a sum of so many reads to memory midway
    "realize_acc_reads_threshold": 128,
    "realize_opcount_threshold": 1000,
    # the three channels of a pixel are written by the kernel that computes them
    "max_pointwise_cat_inputs": 0,
}
"""Inductor's settings (torch/_inductor/config.py) for `pipeline.fused`."""


@dataclass(frozen=True)
class Masking:
    """How one copy of a view is masked.

    Attributes:
        masks: where; as many rows as the view has, on its device.
        std: standard deviation of the noise, in normalized units.
        noise: (N, 3, cell, cell) float32, standard normal, on the device: each view's tile, which
            is repeated over its grid. None where the fill is not `noise`.
        content: for any other fill, the function from unmasked images (n, 3, H, W) to what
            replaces their masked pixels, broadcastable to them.
    """

    masks: Masks
    std: float
    noise: Tensor | None
    content: Callable[[Tensor], Tensor] | None

    def row(self, row: int) -> "Masking":
        """Return the masking of one view."""
        noise = None if self.noise is None else self.noise[row : row + 1]
        return replace(self, masks=self.masks.of(slice(row, row + 1)), noise=noise)


def make_views(
    image: Tensor,
    look: Photometric,
    maskings: Sequence[Masking | None],
    recipe: Recipe,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Make the copies of N views that the encoder sees; the work before the masks is done once.

    Args:
        image: (N, H, W, 3) uint8, cut; on the device where the views are made.
        look: their photometric parameters, on the host.
        maskings: one for each copy; None for a copy without a mask.
        recipe: the filters and the fill.
        out: on a CPU, where to write the copies; new memory if None.

    Returns:
        For each copy (N, 3, H, W) float32, normalized, channels_last.
    """
    if image.device.type == "cpu":
        shape = (len(image), 3, *image.shape[1:3])
        new = [torch.empty(shape, memory_format=torch.channels_last) for _ in maskings]
        return make_on_cpu(image, look, maskings, recipe, new if out is None else list(out))
    assert out is None, "memory is given on a CPU only"
    return make_on_gpu(image, look, maskings, recipe)


def make_on_cpu(
    image: Tensor,
    look: Photometric,
    maskings: Sequence[Masking | None],
    recipe: Recipe,
    out: list[Tensor],
) -> list[Tensor]:
    """Make the views one by one: see the top of this file for why."""
    rows = [slice(row, row + 1) for row in range(len(image))]
    views = (unmasked(image[row], look.of(row), recipe) for row in rows)
    contents: list[Tensor | None] = [None] * len(maskings)
    if recipe.fill not in FUSED_FILLS:  # a user's fill sees all views that we were given
        every = torch.cat(list(views))
        contents = [
            None if one is None or one.content is None else one.content(every).expand_as(every)
            for one in maskings
        ]
        views = (every[row] for row in rows)
    for row, view in zip(rows, views, strict=True):
        for masking, target, content in zip(maskings, out, contents, strict=True):
            if masking is None:
                target[row] = view
            else:
                own = masking.row(row.start)
                mix(view, own, recipe, None if content is None else content[row], target[row])
    return out


def unmasked(image: Tensor, look: Photometric, recipe: Recipe) -> Tensor:
    """Make views with PyTorch's own operators: (N, H, W, 3) uint8 -> (N, 3, H, W), normalized."""
    return encoder_input_(photometric.apply(image, look), recipe)


def encoder_input_(image: Tensor, recipe: Recipe) -> Tensor:
    """Normalize (N, 3, H, W) in 0 .. 1 in place; return it, or its high-pass if the recipe has one.

    Args:
        image: float32.
    """
    for channel, mean, std in zip(image.unbind(1), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return high_pass(image, recipe) if recipe.high_pass else image


def mix(
    view: Tensor, masking: Masking, recipe: Recipe, content: Tensor | None, out: Tensor
) -> None:
    """Write views with their masked pixels replaced; a content of None is made here."""
    if masking.noise is not None:
        content = repeat_tile(masking.noise * masking.std, recipe)
    elif content is None:
        assert masking.content is not None, f"the fill {recipe.fill} has no content"
        content = masking.content(view)
    # a weight of 0 or 1 chooses: on a CPU fifteen times as fast as `where`
    pixels = masking.masks.pixels(slice(None), view.shape[-1])
    torch.lerp(view, content, pixels, out=out)


def make_on_gpu(
    image: Tensor, look: Photometric, maskings: Sequence[Masking | None], recipe: Recipe
) -> list[Tensor]:
    """Make the views of a whole batch, compiled if possible."""
    is_fused = recipe.fill in FUSED_FILLS
    covers = [cover(masking) for masking in maskings] if is_fused else [None]
    table = to_device(fused.pack(look, recipe), image.device)
    views = compiled_chain(recipe).try_call(image, table, covers)
    if views is not None and is_fused:
        return views
    # a user's fill sees the views before they are masked
    view = unmasked(image, look, recipe) if views is None else views[0]
    return copies(view, maskings, recipe)


@cache
def compiled_chain(recipe: Recipe) -> Compiled:
    return Compiled(fused.build_chain(recipe), options=COMPILER_OPTIONS)


def cover(masking: Masking | None) -> fused.Cover | None:
    """Return the tensors of a masking that the compiled function takes."""
    if masking is None:
        return None
    masks = masking.masks
    return fused.Cover(masks.cells, masks.window, masks.focal, masking.noise, masking.std)


def copies(view: Tensor, maskings: Sequence[Masking | None], recipe: Recipe) -> list[Tensor]:
    """Return the copies of the views, each with its masked pixels replaced, channels_last."""
    found = []
    for masking in maskings:
        copy = torch.empty_like(view, memory_format=torch.channels_last)
        if masking is None:
            copy.copy_(view)
        else:
            mix(view, masking, recipe, None, copy)
        found.append(copy)
    return found
