"""Measure how closely a stored map agrees with the map that a network computes on the view itself.

On random resized crops of photos, the foreground from the stored map (cut, resampled and
thresholded exactly as in the pipeline) is compared with the foreground of the same backbone run
online on the crop's pixels, both after and before the photometric jitter of training.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
import tyro
from nvidia.dali import types
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms import RandomResizedCrop, v2

from bench.photos import list_photos
from bench.table import check_counts
from pipeline.crop import crop_on_host
from pipeline.masks import find_foreground
from pipeline.recipes import RECIPES
from precompute import demo_scenes
from precompute.decode import decode
from precompute.estimators import Estimator, EstimatorOptions, ScdaOptions, SpectralOptions
from precompute.estimators.maps import standardize
from precompute.estimators.scda import ScdaEstimator
from precompute.estimators.windows import list_windows
from precompute.reencode import Resize, check
from schemas.errors import UserError
from schemas.saliency import SaliencyMap

BINS = (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
"""Limits of the bins of crop areas, as shares of the image; the table has one column per bin."""
SCENES = 400
BATCH = 32


@dataclass(frozen=True)
class Options:
    """Compare the foreground of stored maps with that of online maps on crops of photos."""

    root: str = tyro.MISSING
    """Folder of photos at their original size."""
    backbone: str = "resnet50"
    """Name of a torchvision classification CNN."""
    weights: str = "DEFAULT"
    """Name of torchvision weights, or path of a state_dict."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the backbone; auto is bf16 on a device that has instructions for it."""
    crops: int = 8
    """Number of random crops per photo."""
    seed: int = 0
    """Random seed for crops and jitter."""

    def __post_init__(self) -> None:
        check_counts(self, "crops")


class Crop(NamedTuple):
    """A random resized crop: the index of the image, and y0 x0 y1 x1 as shares of it."""

    image: int
    window: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        y0, x0, y1, x1 = self.window
        return (y1 - y0) * (x1 - x0)


def build_scda_options(options: Options, **changes: Any) -> ScdaOptions:
    """Return the estimator's options for this backbone, with the given changes."""
    return ScdaOptions(options.backbone, options.weights, precision=options.precision, **changes)


def list_candidates(options: Options) -> dict[str, tuple[list[EstimatorOptions], str]]:
    """Return, by name, estimators whose z-scored maps are averaged, and the number of forwards."""

    def make_scda(*areas: float, size: int = 224) -> ScdaOptions:
        return build_scda_options(options, areas=areas, size=size)

    return {
        "whole image, 224 px": ([make_scda(1.0)], "1"),
        "whole image, 320 px": ([make_scda(1.0, size=320)], "2.0"),
        "whole image, 448 px": ([make_scda(1.0, size=448)], "4"),
        "whole image, 224 and 448 px": ([make_scda(1.0), make_scda(1.0, size=448)], "5"),
        "windows of 0.45": ([make_scda(0.45)], ""),
        "whole + windows of 0.6": ([make_scda(1.0, 0.6)], ""),
        "whole + windows of 0.45 (the default)": ([make_scda(1.0, 0.45)], ""),
        "whole + windows of 0.3": ([make_scda(1.0, 0.3)], ""),
        "whole + windows of 0.6 and 0.3": ([make_scda(1.0, 0.6, 0.3)], ""),
        "spectral": ([SpectralOptions()], "0"),
    }


def decode_photos(root: str) -> Iterator[Any]:
    """Yield the photos as DALI batches."""
    source, images = list_photos(root)
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        encoded = [check(image, source.read(image), {}, Resize()) for image in batch]
        _, pixels, rejects = decode(encoded)
        if rejects:
            raise UserError(f"{rejects[0].source}: {rejects[0].detail}")
        yield pixels


def compute_stored_maps(estimators: list[Estimator], images: Any) -> list[np.ndarray]:
    """Return the maps as a loader reads them back from a shard, each (side, side) uint8."""
    maps = torch.stack([standardize(torch.from_numpy(estimate(images))) for estimate in estimators])
    return [SaliencyMap.quantize(saliency).grid for saliency in maps.mean(dim=0).numpy()]


def crop_maps(grids: list[np.ndarray], crops: list[Crop], grid: int) -> Tensor:
    """Return the (crops, grid, grid) float32 cells that the pipeline cuts out of the maps."""
    cells = ndd.resize(
        ndd.as_batch([grids[crop.image][..., None] for crop in crops]),
        roi_start=ndd.as_batch([np.array(crop.window[:2], np.float32) for crop in crops]),
        roi_end=ndd.as_batch([np.array(crop.window[2:], np.float32) for crop in crops]),
        roi_relative=True,
        size=[grid, grid],
        interp_type=types.INTERP_LINEAR,
        dtype=types.FLOAT,
    )
    return torch.from_numpy(np.array(ndd.as_tensor(cells))).squeeze(-1)


class Study:
    """Crops of photos, the foreground of their online maps, and the comparison with stored maps."""

    def __init__(self, options: Options):
        self.recipe = RECIPES["hp"]
        self.photos = list(decode_photos(options.root))
        torch.manual_seed(options.seed)
        online = ScdaEstimator(build_scda_options(options))
        side = self.recipe.crop_size
        self.crops: list[Crop] = []
        self.shapes: list[tuple[int, int]] = []
        plain, jittered = [], []
        jitter = build_training_jitter()
        for index, image in enumerate(self.images()):
            height, width = image.shape[:2]
            views = []
            for _ in range(options.crops):
                top, left, h, w = RandomResizedCrop.get_params(
                    image.permute(2, 0, 1),
                    list(self.recipe.crop_area),
                    list(self.recipe.crop_ratio),
                )
                window = (top / height, left / width, (top + h) / height, (left + w) / width)
                self.crops.append(Crop(index, window))
                views.append(crop_on_host(image, torch.tensor(window), side))
            plain.append(online.aggregate(torch.stack(views).permute(0, 2, 3, 1)))
            moved = torch.stack([jitter(view) for view in views])
            jittered.append(online.aggregate(moved.permute(0, 2, 3, 1)))
            self.shapes.append((height, width))
        self.plain, self.jittered = (
            self.find_foreground_cells(torch.cat(maps)) for maps in (plain, jittered)
        )
        self.areas = torch.tensor([crop.area for crop in self.crops])

    def images(self) -> Iterator[Tensor]:
        """Yield the photos, each (height, width, 3) uint8."""
        return (torch.from_numpy(np.array(i.cpu())) for batch in self.photos for i in batch)

    def views(self) -> Iterator[Tensor]:
        """Cut all crops again and yield them in the order of `crops`: (side, side, 3) uint8."""
        images = list(self.images())
        for crop in self.crops:
            window = torch.tensor(crop.window)
            view = crop_on_host(images[crop.image], window, self.recipe.crop_size)
            yield view.permute(1, 2, 0)

    def find_foreground_cells(self, maps: Tensor) -> Tensor:
        """Return the foreground of maps (N, h, w) on the recipe's grid: (N, grid * grid) bool, on
        the CPU.

        A network whose stride is not 32, such as SqueezeNet, makes larger maps.
        """
        cells = adaptive_avg_pool2d(maps[:, None].float().cpu(), self.recipe.grid)[:, 0]
        return find_foreground(cells, self.recipe.foreground_margin).flatten(1)

    def compare_maps(self, options: Options) -> Iterator[str]:
        """Yield the rows of the table."""
        generator = torch.Generator().manual_seed(options.seed)
        chance = torch.rand(self.jittered.shape, generator=generator)
        share = self.jittered.float().mean()
        yield self.format_row("random cells, as many", chance < share, "0")
        yield self.format_row("online, before the jitter", self.plain, "online")
        for name, (choices, cost) in list_candidates(options).items():
            estimators = [choice.build() for choice in choices]
            grids = [
                grid for batch in self.photos for grid in compute_stored_maps(estimators, batch)
            ]
            views = self.find_foreground_cells(crop_maps(grids, self.crops, self.recipe.grid))
            yield self.format_row(name, views, cost or self.count_forwards(choices))

    def count_forwards(self, choices: list[EstimatorOptions]) -> str:
        """Return the mean number of forward passes at 224 x 224 per image."""
        counts = [
            len(list_windows(*shape, area))
            for shape in self.shapes
            for choice in choices
            if isinstance(choice, ScdaOptions)
            for area in choice.areas
        ]
        return f"{sum(counts) / len(self.shapes):.1f}"

    def format_row(self, name: str, cells: Tensor, cost: str) -> str:
        both = compute_iou(cells, self.jittered)
        figures = [
            both.mean(),
            compute_iou(cells, self.plain).mean(),
            (cells == self.jittered).float().mean(),
            (cells.float().mean(1) - self.jittered.float().mean(1)).abs().mean(),
        ]
        for low, high in itertools.pairwise(BINS):
            inside = (self.areas >= low) & ((self.areas < high) | (high == 1))
            figures.append(both[inside].mean())
        return f"| {name} | {cost} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"


def compute_iou(first: Tensor, second: Tensor) -> Tensor:
    return (first & second).sum(1) / (first | second).sum(1)


def build_training_jitter() -> v2.Transform:
    """Return MoCo v2's photometric augmentation."""
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5),
        ]
    )


def compare_with_objects(options: Options) -> Iterator[str]:
    """Yield table rows for generated scenes, whose objects are known.

    The columns are the share of the foreground that lies on the object, and the share of the object
    that the foreground covers.
    """
    scenes = [demo_scenes.draw_scene(index, "val") for index in range(SCENES)]
    chosen: dict[str, EstimatorOptions] = {
        "spectral": SpectralOptions(),
        "scda": build_scda_options(options),
    }
    sizes = np.mean([scene.mask.mean() for scene in scenes])
    yield f"| chance | {sizes:.3f} | |"
    for name, choice in chosen.items():
        estimator = choice.build()
        on, covered = [], []
        for start in range(0, SCENES, BATCH):
            part = scenes[start : start + BATCH]
            maps = estimator(ndd.as_batch([scene.image for scene in part]).evaluate())
            front = find_foreground(torch.from_numpy(maps), RECIPES["hp"].foreground_margin)
            for scene, cells in zip(part, front, strict=True):
                mask = torch.from_numpy(scene.mask).float()[None, None]
                share = adaptive_avg_pool2d(mask, cells.shape)[0, 0]
                on.append((share * cells).sum() / cells.sum())
                covered.append((share * cells).sum() / share.sum())
        yield f"| {name} | {np.mean(on):.3f} | {np.mean(covered):.3f} |"
