"""PlainViews: every image once, centre crop, no draws. For the evaluation of an encoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline import devices, reader
from pipeline.assemble import normalised
from pipeline.cache import Cache
from pipeline.draws import to_device
from pipeline.recipes import REFERENCE_CROP, Recipe, get_recipe
from schemas import UserError

RESIZE_OVER_CROP = 256 / 224
"""Short side over crop, as in MoCo's and torchvision's evaluation."""


@dataclass(frozen=True, eq=False)
class PlainBatch:
    """N images on the device, N at most the batch size.

    Attributes:
        image: (N, 3, crop_size, crop_size) float32, normalised, channels_last.
        label: (N,) int64; -1 for none.
    """

    image: Tensor
    label: Tensor


class PlainViews:
    """One pass over a dataset in its order on disk; over all ranks each sample comes exactly once.

    The last batch of a rank may be smaller, ranks may differ by one sample, and nothing is padded
    or left out. Each iteration starts from the first sample.

    Args:
        url: the dataset's folder: a plain path, s3:// or gs://; with a cache any fsspec URL.
        batch_size: samples a batch, at most.
        device: `cuda` or `cpu`.
        rank, world_size: this process among all.
        resize: pixels of the short side before the crop; by default crop_size * 256 / 224.
        crop_size: side of the centre crop in pixels.
        recipe: what the encoder was trained with; one with `high_pass` filters these images as
            well, as the released linear evaluation does (methods table D15).
        cache: where a remote dataset is copied to first.

    Raises:
        UserError: the dataset, the recipe or the device does not allow it.
    """

    def __init__(
        self,
        url: str | Path,
        batch_size: int = 256,
        device: str = "cuda",
        rank: int = 0,
        world_size: int = 1,
        resize: int | None = None,
        crop_size: int = REFERENCE_CROP,
        recipe: str | Recipe = "none",
        cache: Cache | None = None,
    ):
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        self.device = devices.device_of(device)
        self.shards = reader.open_shards(url, cache)
        self.resize = round(crop_size * RESIZE_OVER_CROP) if resize is None else resize
        if batch_size < 1 or not 0 <= rank < world_size or not 1 <= crop_size <= self.resize:
            raise UserError(
                f"batch size {batch_size}, rank {rank} of {world_size}, crop {crop_size} of "
                f"{self.resize} pixels: a batch has at least 1 sample, ranks are 0 .. world size - "
                "1 and the crop fits the resized image"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.crop_size = crop_size
        total = self.shards.samples
        # DALI's own split of the samples among ranks
        self.samples = total * (rank + 1) // world_size - total * rank // world_size
        if total < world_size:
            raise UserError(f"{url}: {total} samples are too few for {world_size} ranks")

    def __len__(self) -> int:
        """Batches of this rank."""
        return (self.samples + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[PlainBatch]:
        pipeline = plain_graph(
            self.shards,
            self.device,
            self.rank,
            self.world_size,
            self.resize,
            self.crop_size,
            batch_size=self.batch_size,
            num_threads=reader.threads(),
            device_id=self.device.index,
        )
        for start in range(0, self.samples, self.batch_size):
            label, image = map(reader.tensor, reader.run(pipeline, self.device, self.shards))
            # DALI fills the last batch from the next pass
            count = min(self.batch_size, self.samples - start)
            labels = to_device(reader.parse_labels(label[:count]), self.device)
            unmasked = image[:count].permute(0, 3, 1, 2).float().div_(255)
            yield PlainBatch(normalised(unmasked, self.recipe), labels)


@pipeline_def
def plain_graph(
    shards: reader.Shards,
    device: torch.device,
    rank: int,
    world_size: int,
    resize: int,
    crop_size: int,
) -> tuple[Any, ...]:
    """The DALI graph: label, image (uint8 HWC)."""
    sample = reader.read(shards, rank, world_size)
    image = reader.decode(sample.image, device)
    # the centre's share of the short side: resize and crop as one, so that no side is rounded
    extent = fn.cast(image.shape()[:2], dtype=types.FLOAT)
    side = fn.reductions.min(extent) * (crop_size / resize)
    view = fn.resize(
        image,
        roi_start=(extent - side) / 2,
        roi_end=(extent + side) / 2,
        size=[crop_size, crop_size],
        interp_type=types.INTERP_LINEAR,
    )
    return sample.label, view
