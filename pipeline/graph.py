"""The DALI graph of `MaskedViews`: shards -> two views a sample, cut and not yet changed."""

import random
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types

from pipeline import reader, views
from pipeline.recipes import Recipe

SHUFFLE_BUFFER = 1024
"""Samples in the reader's buffer: DALI's default, some 100 MB of JPEG."""


def in_drawn_order(shards: reader.Shards, *key: str | int) -> reader.Shards:
    """The shards in an order that the key decides."""
    order = list(range(len(shards.tars)))
    random.Random(reader.derived_seed("shards", *key)).shuffle(order)
    return shards.in_order(order)


def read_shuffled(shards: reader.Shards, rank: int, world_size: int, seed: int) -> reader.Encoded:
    """In the graph: this rank's share of each epoch, shuffled.

    Shares of the ranks may differ by one sample; `pad_last_batch` makes each rank's epoch
    ceil(longest share / batch) batches, by repeats that lie only in batches that are thrown away.
    """
    return reader.read(
        shards,
        rank,
        world_size,
        random_shuffle=True,
        initial_fill=SHUFFLE_BUFFER,
        shuffle_after_epoch=True,
        pad_last_batch=True,
        seed=seed,
    )


@pipeline_def
def graph(
    shards: reader.Shards,
    recipe: Recipe,
    device: torch.device,
    rank: int,
    world_size: int,
    shuffle_seed: int,
    cuts: bool,
    guided: bool,
) -> tuple[Any, ...]:
    """The DALI graph: label, source, image, then a view or a pair: window, saliency, view.

    Where it `cuts` it hands out views, otherwise the image they are to be cut from; saliency only
    where views are `guided` by it.
    """
    sample = read_shuffled(shards, rank, world_size, shuffle_seed)
    image = reader.decode(sample.image, device)
    saliency = fn.decoders.image(sample.saliency, output_type=types.GRAY) if guided else None
    outputs = [sample.label, sample.source]
    if not cuts:
        outputs.append(image)
    for _ in range(1 + recipe.pair):
        window = views.draw_window(image.shape(), recipe)
        outputs.append(fn.cat(window.start, window.end))
        if guided:
            cells = views.cut_saliency(saliency, window, recipe)
            outputs.append(cells.gpu() if device.type == "cuda" else cells)
        if cuts:
            outputs.append(views.cut(image, window, recipe.crop_size))
    return tuple(outputs)
