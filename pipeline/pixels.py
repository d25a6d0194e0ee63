"""Cut views -> what the encoder sees: jitter, blur, normalization, high-pass, masks and fills.

`make_views` draws nothing: parameters in, tensors out. It runs in one of three ways that agree to
rounding:

* on a CPU image by image with PyTorch's own operators, so that a view is the same bit for bit
  whatever the batch and the part of it that a thread works on: the last elements of a tensor, which
  do not fill a vector register, may be rounded differently from the others;
* on a GPU as a few compiled kernels (`pipeline.fused`);
* on a GPU whose machine has no compiler, with PyTorch's own operators on the whole batch.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline import fused, photometric
from pipeline.blur import high_pass
from pipeline.draws import to_device
from pipeline.fills import repeat_tile
from pipeline.fused import FUSED_FILLS, MEAN, STD
from pipeline.masks import Masks
from pipeline.photometric import Photometric
from pipeline.recipes import Recipe

log = logging.getLogger(__name__)

COMPILER_OPTIONS: dict[str, str | int | bool] = {
    # one kernel per blur axis: by default Inductor writes a sum of so many reads to memory midway
    "realize_acc_reads_threshold": 128,
    "realize_opcount_threshold": 1000,
    # the three channels of a pixel are written by the kernel that computes them
    "max_pointwise_cat_inputs": 0,
}
"""Inductor's settings (torch/_inductor/config.py) for `pipeline.fused`."""

RECOMPILE_LIMIT = 64
"""Compiled forms in one process: one per recipe, batch size and branch (PyTorch's default is 8)."""

OLDEST_CAPABILITY = (7, 0)
"""The oldest GPU that Inductor's kernels run on (torch/_inductor/scheduler.py)."""


@dataclass(frozen=True)
class Masking:
    """How one copy of a view is masked.

    Attributes:
        masks: where; as many rows as the view has, on its device.
        std: standard deviation of the noise, in normalized units.
        noise: (N, 3, cell, cell) float32, standard normal, on the device: each view's tile, repeated
            over its grid. None where the fill is not `noise`.
        content: for any other fill, the function from unmasked images (n, 3, H, W) to what replaces
            their masked pixels, broadcastable to them.
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
    return gpu_chain(recipe, image.device)(image, look, maskings)


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


GpuChain = Callable[[Tensor, Photometric, Sequence[Masking | None]], list[Tensor]]


@cache
def gpu_chain(recipe: Recipe, device: torch.device) -> GpuChain:
    """Return the function that makes this recipe's views on this GPU, compiled if possible."""
    eager = partial(make_with_operators, recipe=recipe)
    reason = why_not_compiled(device)
    if reason is not None:
        log.warning(
            f"views are made without a compiler ({reason}): about 700 kernels per batch in place "
            "of about 15"
        )
        return eager
    return Compiled(recipe, eager)


class Compiled:
    """The compiled pixels of one recipe; falls back to PyTorch's operators if compiling fails."""

    def __init__(self, recipe: Recipe, eager: GpuChain) -> None:
        self.recipe, self.eager = recipe, eager
        self.chain: fused.Chain | None = torch.compile(
            fused.build_chain(recipe), fullgraph=True, dynamic=False, options=COMPILER_OPTIONS
        )

    def __call__(
        self, image: Tensor, look: Photometric, maskings: Sequence[Masking | None]
    ) -> list[Tensor]:
        if self.chain is None:
            return self.eager(image, look, maskings)
        table = to_device(fused.pack(look, self.recipe), image.device)
        is_fused = self.recipe.fill in FUSED_FILLS
        covers = [cover(masking) if is_fused else None for masking in maskings]
        if not is_fused:
            covers = [None]  # one view; a user's fill comes before its masks
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                views = self.chain(image, table, covers)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning(
                f"the pixels could not be compiled, views are made without: {error}", exc_info=True
            )
            self.chain = None
            return self.eager(image, look, maskings)
        return views if is_fused else copies(views[0], maskings, self.recipe)


def cover(masking: Masking | None) -> fused.Cover | None:
    """Return the tensors of a masking that the compiled function takes."""
    if masking is None:
        return None
    masks = masking.masks
    return fused.Cover(masks.cells, masks.window, masks.focal, masking.noise, masking.std)


def make_with_operators(
    image: Tensor, look: Photometric, maskings: Sequence[Masking | None], recipe: Recipe
) -> list[Tensor]:
    """Make the views on a GPU without a compiler."""
    return copies(unmasked(image, look, recipe), maskings, recipe)


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


@cache
def why_not_compiled(device: torch.device) -> str | None:
    """Return what keeps this machine from compiling for its GPU; None if nothing does."""
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    if find_spec("triton") is None:
        return "the package triton is missing"
    # what Triton builds its launchers with
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler: install gcc or clang, or name one by CC"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"Triton knows no GPU of compute capability {capability[0]}.{capability[1]}"
    return None
