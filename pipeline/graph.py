"""The DALI graph: encoded bytes and windows -> decoded, cut and flipped views with their saliency.

The graph draws nothing and keeps nothing: what it is handed decides what comes out.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline.devices import count_cpu_threads
from pipeline.failures import translate_dali_errors
from pipeline.recipes import Interpolation
from pipeline.shards import EncodedBatch

IN_FLIGHT = 2
"""Batches that DALI works on ahead of the one that is taken (its own default)."""

INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Cut:
    """What the graph makes of a batch.

    Attributes:
        crop_size: side of a view in pixels.
        views: how many views of each image.
        grid: side of a view's saliency in cells; None for no saliency.
        interpolation: how a view is resized; its saliency always bilinearly.
        on_device: whether the graph cuts the views; otherwise it hands out the decoded images, and
            PyTorch cuts them, which is faster on a CPU (`crop.crop_on_host`).
    """

    crop_size: int
    views: int = 1
    grid: int | None = None
    interpolation: Interpolation = "bilinear"
    on_device: bool = True


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as the graph is handed it.

    Attributes:
        encoded: N samples.
        windows: for each view (N, 4) float32, y0 x0 y1 x1 as shares of the image; x0 > x1 when
            flipped.
    """

    encoded: EncodedBatch
    windows: list[np.ndarray]


@dataclass(frozen=True)
class DecodedBatch:
    """A batch as the graph hands it out.

    Attributes:
        prepared: what it was made of.
        images: N decoded images, (H, W, 3) uint8 on the CPU; None where the graph cuts.
        views: for each view (N, crop_size, crop_size, 3) uint8 on the device; empty where it does
            not cut.
        saliency: for each view (N, grid, grid) float32 in 0 .. 255 on the device; empty without.
    """

    prepared: PreparedBatch
    images: list[Tensor] | None
    views: list[Tensor]
    saliency: list[Tensor]


class Decoder:
    """Runs the graph over prepared batches, some of them ahead.

    Args:
        batches: of at most `batch_size` samples.
        url: the dataset's folder, for messages.

    Raises:
        UserError: from `next`: what `batches` raises; an image that does not decode, with its
            sample; no memory.
    """

    def __init__(
        self,
        batches: Iterator[PreparedBatch],
        cut: Cut,
        device: torch.device,
        batch_size: int,
        url: str,
    ) -> None:
        self.batches, self.cut, self.device, self.url = batches, cut, device, url
        self._in_flight: deque[PreparedBatch] = deque()
        self._pipeline = view_graph(
            self._feed,
            cut,
            device,
            batch_size=batch_size,
            num_threads=count_cpu_threads(),
            device_id=device.index,
            prefetch_queue_depth=IN_FLIGHT,
        )
        with translate_dali_errors(url):
            self._pipeline.build()

    def _feed(self) -> tuple[Any, ...]:
        """Hand the next batch to DALI, which does not copy it: it is kept until it comes out."""
        prepared = next(self.batches)
        self._in_flight.append(prepared)
        encoded = prepared.encoded
        inputs: list[Any] = [encoded.images]
        if self.cut.grid is not None:
            inputs.append(encoded.maps)
        if self.cut.on_device or self.cut.grid is not None:
            for window in prepared.windows:
                inputs += [np.ascontiguousarray(window[:, :2]), np.ascontiguousarray(window[:, 2:])]
        return tuple(inputs)

    def __iter__(self) -> Iterator[DecodedBatch]:
        return self

    def __next__(self) -> DecodedBatch:
        streams = () if self.device.type == "cpu" else (torch.cuda.current_stream(self.device),)
        with translate_dali_errors(self.url, lambda: [b.encoded for b in self._in_flight]):
            outputs = list(self._pipeline.run(*streams))
        images = None if self.cut.on_device else tensors(outputs.pop(0))
        views, saliency = [], []
        for _ in range(self.cut.views):
            if self.cut.grid is not None:
                saliency.append(tensor(outputs.pop(0)).squeeze(-1))
            if self.cut.on_device:
                views.append(tensor(outputs.pop(0)))
        return DecodedBatch(self._in_flight.popleft(), images, views, saliency)


@pipeline_def
def view_graph(source: Any, cut: Cut, device: torch.device) -> tuple[Any, ...]:
    """Build the graph. Its outputs: the decoded images unless it cuts; saliency and view, by view.

    Args:
        source: gives the inputs of a batch: encoded images; encoded maps, if there is a grid;
            start and end of each view's window, if any of the two is cut here.
    """
    windows = cut.views if cut.on_device or cut.grid is not None else 0
    inputs = list(
        fn.external_source(
            source=source,
            num_outputs=1 + (cut.grid is not None) + 2 * windows,
            batch=True,
            no_copy=True,
        )
    )
    decoder = "mixed" if device.type == "cuda" else "cpu"
    image = fn.decoders.image(inputs.pop(0), device=decoder, output_type=types.RGB)
    outputs = [] if cut.on_device else [image]
    if cut.grid is not None:
        saliency = fn.decoders.image(inputs.pop(0), output_type=types.GRAY)
    for _ in range(windows):
        start, end = inputs.pop(0), inputs.pop(0)
        if cut.grid is not None:
            cells = cut_window(saliency, start, end, cut.grid, "bilinear", dtype=types.FLOAT)
            outputs.append(cells.gpu() if device.type == "cuda" else cells)
        if cut.on_device:
            outputs.append(cut_window(image, start, end, cut.crop_size, cut.interpolation))
    return tuple(outputs)


def cut_window(
    image: Any, start: Any, end: Any, side: int, interpolation: Interpolation, **options: Any
) -> Any:
    """Crop, resize to side x side (antialiased) and flip, in one operator.

    Args:
        start, end: (y, x) as shares of the image; x runs backwards when flipped.
    """
    return fn.resize(
        image,
        roi_start=start,
        roi_end=end,
        roi_relative=True,
        size=[side, side],
        interp_type=INTERPOLATIONS[interpolation],
        **options,
    )


def tensor(output: Any) -> Tensor:
    """Return a uniform output of the graph as a tensor, without a copy."""
    return torch.from_dlpack(output.as_tensor())


def tensors(output: Any) -> list[Tensor]:
    """Return an output whose samples differ in shape as tensors, without a copy."""
    return [torch.from_dlpack(sample) for sample in output]
