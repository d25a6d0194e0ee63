"""Measure what the side of a stored map costs, in fidelity and in bytes.

The default estimator is compared with a perfect one, whose map of a view is known without a
network: the view's own brightness. Any loss of its stored map is caused by the grid alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from bench.fidelity import (
    Options,
    Study,
    build_scda_options,
    compute_iou,
    compute_stored_maps,
    crop_maps,
)
from schemas.saliency import SaliencyMap

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class SideOptions(Options):
    """Compare stored maps of several sides: IoU with online maps, and bytes."""

    sides: tuple[int, ...] = (14, 28, 56, 112)
    """Numbers of cells on a side of the stored maps."""


def compute_brightness(pixels: Tensor) -> Tensor:
    """Convert (height, width, 3) uint8 pixels to (1, 1, height, width) float32 luma."""
    return (pixels.float() @ torch.tensor(LUMA))[None, None]


def compare_sides(study: Study, options: SideOptions) -> Iterator[str]:
    """Yield the table's rows, one per side."""
    grid = study.recipe.grid
    own = torch.cat(
        [adaptive_avg_pool2d(compute_brightness(view), grid)[0] for view in study.views()]
    )
    exact = study.find_foreground_cells(own)
    for side in options.sides:
        scda = build_scda_options(options, side=side).build()
        grids = [
            own_map for batch in study.photos for own_map in compute_stored_maps([scda], batch)
        ]
        cells = study.find_foreground_cells(crop_maps(grids, study.crops, grid))
        bright = [
            SaliencyMap.quantize(
                interpolate(
                    compute_brightness(image), (side, side), mode="bilinear", antialias=True
                )[0, 0].numpy()
            ).grid
            for image in study.images()
        ]
        perfect = study.find_foreground_cells(crop_maps(bright, study.crops, grid))
        size = np.mean([len(SaliencyMap(own_map, 0, 1).to_png()) for own_map in grids])
        figures = [
            compute_iou(cells, study.jittered),
            compute_iou(cells, study.plain),
            compute_iou(perfect, exact),
        ]
        text = " | ".join(f"{figure.mean():.3f}" for figure in figures)
        yield f"| {side} x {side} | {text} | {size:.0f} |"
