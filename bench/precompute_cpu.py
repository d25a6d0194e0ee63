"""Measure the CPU milliseconds per image of a precompute worker without network and pixels.

With a GPU, the network, the decoding and the cutting of windows run there. The rest, which runs on
the CPU, bounds a worker's rate: reading, parsing headers, calling DALI and PyTorch, pasting maps,
packing and writing. All of that runs here as in a worker, over real photos with their true shapes,
while pixels and network are replaced by the smallest possible stand-ins: a decoded image has 8 x 8
pixels, a window has one pixel, and the maps of windows are constant. The CPU time of all threads is
counted, because other work on the machine disturbs it less than a rate.

DALI's operator that cuts windows on a CPU wakes a thread for each window and waits for it in a loop
(`sched_yield`); on a GPU it launches one kernel for all windows.
So a second figure leaves this operator out; with a GPU, the host's time lies between the two.
"""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import nn

from precompute import decode
from precompute.estimators import ScdaOptions, scda
from precompute.estimators.windows import Window, cut
from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage
from precompute.threads import use_threads
from schemas.storage import Store

SIDE = 8
CELLS = 7
"""Cells on a side of a window's map: ResNet-50's at 224 pixels."""


class Photo:
    """Stand-in for a decoded image of this shape."""

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape


class Photos:
    """Stand-in for a decoded batch: DALI tensors of a few pixels, with the photos' true shapes."""

    def __init__(self, decoded: Any, photos: list[Photo]):
        self.decoded, self.photos = decoded, photos

    def __iter__(self) -> Iterator[Photo]:
        return iter(self.photos)


class GivenMaps(nn.Module):
    """Stand-in for the network: it returns the same maps for any windows."""

    def __init__(self) -> None:
        super().__init__()
        size = max(scda.WINDOWS_AT_ONCE.values())
        self.maps = torch.rand(size, 1, CELLS, CELLS, generator=torch.Generator().manual_seed(0))

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"map": self.maps[: len(inputs)]}


@contextmanager
def replace_pixels(source: Source, images: list[SourceImage], cuts: bool) -> Iterator[None]:
    """Let DALI decode and, if it cuts, cut a few pixels in place of each image's own."""
    photos = {}
    for image in images:
        with Image.open(io.BytesIO(source.read(image))) as header:
            photos[image.key] = Photo((header.height, header.width, 3))
    buffer = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(buffer, "JPEG")
    few = mock.Mock(content=buffer.getvalue())
    decode_batch = decode.decode_batch

    def decode_few(encoded: list[Any]) -> Photos:
        decoded = decode_batch([few] * len(encoded))
        return Photos(decoded, [photos[encoded_image.image.key] for encoded_image in encoded])

    def cut_few(images: Any, places: list[tuple[int, Window]], size: int) -> torch.Tensor:
        if not cuts:
            return torch.zeros(len(places), 1, 1, 3, dtype=torch.uint8)
        return cut(images.decoded, [(index, Window(0, 0, SIDE, SIDE)) for index, _ in places], 1)

    with (
        mock.patch.object(decode, "decode_batch", decode_few),
        mock.patch.object(scda, "cut", cut_few),
    ):
        yield


def measure_cpu(
    source: Source, images: list[SourceImage], folder: Path, repeats: int, cuts: bool = True
) -> list[float]:
    """Return CPU milliseconds per image for building one shard: `repeats` values after a warm-up.

    Args:
        cuts: True to let DALI cut the windows; otherwise they are given.

    PyTorch and DALI get one thread each: the waiting threads of a pool would count as work.
    """
    threads = torch.get_num_threads()
    use_threads(1)
    estimator = scda.ScdaEstimator(ScdaOptions("squeezenet1_1", "random"), "cpu")
    estimator.trunk = GivenMaps()
    builder = ShardBuilder(source, estimator, Store(folder), 32, Resize(), {})
    milliseconds = []
    with replace_pixels(source, images, cuts):
        for shard in range(repeats + 1):
            start = time.process_time()
            marker = builder.build(shard, images)
            milliseconds.append(1000 * (time.process_time() - start) / len(images))
            if len(marker.samples) != len(images):
                raise ValueError(f"{len(marker.rejects)} of the photos were rejected")
    use_threads(threads)
    return milliseconds[1:]
