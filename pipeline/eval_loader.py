"""EvalViews: the center crop of every image, once and without randomness, to evaluate encoders."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline import devices
from pipeline.cache import Cache
from pipeline.crop import compute_center_windows
from pipeline.graph import Decoder, PreparedBatch, ViewSpec
from pipeline.order import DiskOrder
from pipeline.pixels import make_plain_views
from pipeline.recipes import REFERENCE_CROP, Recipe, get_recipe
from pipeline.shards import ShardReader, open_source
from schemas import ShardDataset, UserError

RESIZE_OVER_CROP = 256 / 224
"""Ratio of the resized short side to the crop in MoCo's and torchvision's evaluation."""


@dataclass(frozen=True, eq=False)
class EvalBatch:
    """N images on the device, N at most the batch size.

    Attributes:
        image: (N, 3, crop_size, crop_size) float32, normalized, channels_last.
        label: (N,) int64; -1 for samples without a label.
    """

    image: Tensor
    label: Tensor


class EvalViews:
    """One pass over a dataset in its order on disk; all ranks together yield each sample once.

    The last batch of a rank may be smaller and ranks may differ by one sample; nothing is padded or
    dropped. Each iteration starts from the first sample.

    Args:
        url: dataset folder: a local path or any fsspec URL.
        batch_size: maximum number of samples in a batch.
        device: `cuda` or `cpu`.
        rank, world_size: global rank of this process and the number of processes.
        resize: length of the short side in pixels before the crop; by default
            crop_size * 256 / 224.
        crop_size: side of the center crop in pixels.
        recipe: the recipe that the encoder was trained with; `high_pass` applies to these images
            too, as in the released linear evaluation (docs/method.md, D15).
        cache: folder and maximum size of the cache for the shards of a remote dataset.

    Raises:
        UserError: the dataset, the recipe or the device is unsuitable; while iterating, a shard or
            a sample does not match the tables. The message names it.
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
        self.device = devices.parse_device(device)
        self.resize = round(crop_size * RESIZE_OVER_CROP) if resize is None else resize
        if batch_size < 1 or not 0 <= rank < world_size or not 1 <= crop_size <= self.resize:
            raise UserError(
                f"batch size {batch_size}, rank {rank} of {world_size}, crop {crop_size} of "
                f"{self.resize} pixels: a batch has at least 1 sample, ranks are 0 .. world size - "
                "1 and the crop fits into the resized image"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.crop_size = crop_size
        self.dataset = ShardDataset.open(url)
        self.order = DiskOrder([row.samples for row in self.dataset.shards], batch_size)
        first, end = self.order.find_part(rank, world_size)
        self.samples = end - first
        if self.order.samples < world_size:
            raise UserError(
                f"{url}: {self.order.samples} samples are too few for {world_size} ranks"
            )
        self._source = open_source(self.dataset, cache)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return (self.samples + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[EvalBatch]:
        reader = ShardReader(self.dataset, self._source, self.order, self.rank, self.world_size)
        decoder = Decoder(
            self._prepare(reader),
            ViewSpec(self.crop_size),
            self.device,
            self.batch_size,
            self.dataset.url,
        )
        try:
            for decoded in decoder:
                labels = torch.from_numpy(decoded.prepared.encoded.labels)
                yield EvalBatch(
                    make_plain_views(decoded.views[0], self.recipe),
                    devices.to_device(labels, self.device),
                )
        finally:
            decoder.close()
            self._source.prefetch(())

    def _prepare(self, reader: ShardReader) -> Iterator[PreparedBatch]:
        """Read this rank's batches and find the centers of their images."""
        with closing(reader):
            for step in range(len(self)):
                encoded = reader.read(0, step)
                # the crop as a fraction of the short side: resize and crop in one, without rounding
                window = compute_center_windows(
                    encoded.height, encoded.width, self.crop_size / self.resize
                )
                yield PreparedBatch(encoded, [window])
