"""The DALI graph of `MaskedViews`: shards -> query and key views with their saliency, unmasked."""

from dataclasses import dataclass
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline import fills, reader, views
from pipeline.recipes import Recipe

SHUFFLE_BUFFER = 1024
"""Samples in the reader's buffer: DALI's default, some 100 MB of JPEG."""


@dataclass(frozen=True)
class View:
    """One view as the graph hands it out: nodes there, tensors here (NCHW, channels_last)."""

    image: Any
    saliency: Any
    window: Any
    blur: Any = None


def view_of(outputs: list[Any]) -> View:
    """The graph's outputs of one view as tensors; HWC memory seen as NCHW is channels_last."""
    image, saliency, window, *blur = (reader.tensor(output) for output in outputs)
    return View(
        image=image.permute(0, 3, 1, 2),
        saliency=saliency.squeeze(-1),
        window=window,
        blur=blur[0].permute(0, 3, 1, 2) if blur else None,
    )


def repeated(view: View, times: int) -> View:
    """The view `times` times one after another along the batch."""
    if times == 1:
        return view
    blur = None if view.blur is None else torch.cat([view.blur] * times)
    return View(
        torch.cat([view.image] * times),
        torch.cat([view.saliency] * times),
        torch.cat([view.window] * times),
        blur,
    )


@pipeline_def(enable_conditionals=True)
def graph(
    shards: reader.Shards,
    recipe: Recipe,
    device: torch.device,
    rank: int,
    world_size: int,
    shuffle_seed: int,
) -> tuple[Any, ...]:
    """The DALI graph: label, source, then for query and key: image, saliency, window[, blur].

    Shares of the ranks may differ by one sample; `pad_last_batch` makes each rank's epoch
    ceil(longest share / batch) batches, by repeats that lie only in batches that are thrown away.
    """
    sample = reader.read(
        shards,
        rank,
        world_size,
        random_shuffle=True,
        initial_fill=SHUFFLE_BUFFER,
        shuffle_after_epoch=True,
        pad_last_batch=True,
        seed=shuffle_seed,
    )
    image = reader.decode(sample.image, device)
    saliency = fn.decoders.image(sample.saliency, output_type=types.GRAY)
    outputs = [sample.label, sample.source]
    for _ in range(2):
        window = views.draw_window(image.shape(), recipe)
        view = views.photometric(views.cut(image, window, recipe.crop_size), recipe)
        cells = views.cut_saliency(saliency, window, recipe)
        outputs += [
            fills.encoder_input(view, recipe),
            cells.gpu() if device.type == "cuda" else cells,
            fn.cat(window.start, window.end),
        ]
        if recipe.fill == "blur":
            outputs.append(fills.strong_blur(view, recipe))
    return tuple(outputs)
