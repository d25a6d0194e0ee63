"""The DALI graph: decode images, then crop, resize and flip them and their saliency.

The graph has no randomness and no state: its inputs alone determine its outputs. If `MaskedViews`
decodes on the CPU, PyTorch crops the images that DALI has decoded, in a fifth of the time of DALI's
own operator. For `EvalViews`, DALI crops on the CPU too.
"""

import ctypes
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from torch import Tensor

from pipeline.assemble import ViewParameters
from pipeline.crop import HostCrops
from pipeline.devices import count_cpu_threads
from pipeline.failures import translate_dali_errors
from pipeline.read_ahead import BATCHES_AHEAD, ReadAhead
from pipeline.recipes import Interpolation
from pipeline.rng import BatchRng
from pipeline.shards import EncodedBatch
from schemas import UserError

IN_FLIGHT = 2
"""Batches that DALI prefetches (its own default)."""

HARDWARE_DECODER_LOAD = 0.65
"""Share of a batch's pixels that go to the GPU's JPEG decoder, if it has one (DALI's default); its
multiprocessors and the CPU decode the rest. `bench.gpu_train` measures a step with 1 too."""

INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class ViewSpec:
    """The views to make of each image.

    Attributes:
        crop_size: side of a view in pixels.
        views: number of views per image.
        grid: side of a view's saliency in cells; None for no saliency.
        interpolation: interpolation of the views; saliency is always interpolated bilinearly.
        on_device: True if DALI crops the views, on its device; otherwise PyTorch does, on the host
            (`crop.crop_on_host`).
    """

    crop_size: int
    views: int = 1
    grid: int | None = None
    interpolation: Interpolation = "bilinear"
    on_device: bool = True


@dataclass(frozen=True)
class PreparedBatch:
    """The inputs of the graph for a batch.

    Attributes:
        encoded: N samples.
        windows: crop windows, one (N, 4) float32 array per view, y0 x0 y1 x1 as fractions of the
            image; x0 > x1 if flipped.
        rng: the random streams of the batch, for all that follows; None if nothing is random.
        parameters: the photometric parameters of each view, drawn from them; empty without `rng`.
    """

    encoded: EncodedBatch
    windows: list[np.ndarray]
    rng: BatchRng | None = None
    parameters: Sequence[ViewParameters] = ()


@dataclass(frozen=True)
class DecodedBatch:
    """The crops of a batch, on the decoder's device.

    Attributes:
        prepared: the inputs.
        views: one (N, crop_size, crop_size, 3) uint8 tensor per view.
        saliency: one (N, grid, grid) float32 tensor per view, 0 .. 255; empty if there is no grid.
    """

    prepared: PreparedBatch
    views: list[Tensor]
    saliency: list[Tensor]


@dataclass(frozen=True)
class StartedBatch:
    """A `DecodedBatch` some of whose views the host is still cropping."""

    prepared: PreparedBatch
    views: list[Tensor | HostCrops]
    saliency: list[Tensor]


class Decoder:
    """Decodes and crops prepared batches, with prefetching.

    Args:
        batches: batches of at most `batch_size` samples; only a thread advances this iterator.
        device: device that decodes and crops.
        stage_for_gpu: True if host-cropped views go to a GPU: they are put in pinned memory and
            made one batch ahead of training.
        url: dataset folder, for messages.

    Raises:
        UserError: `next` passes on errors of `batches`, and fails if an image cannot be decoded
            (the message names the sample), memory runs out, or this process was forked meanwhile.
    """

    def __init__(
        self,
        batches: Iterator[PreparedBatch],
        spec: ViewSpec,
        device: torch.device,
        batch_size: int,
        url: str,
        stage_for_gpu: bool = False,
    ) -> None:
        self.spec, self.device, self.url, self.stage_for_gpu = spec, device, url, stage_for_gpu
        self._in_flight: deque[PreparedBatch] = deque()
        self._started: deque[StartedBatch | Exception] = deque()
        # A proxy, so that the pipeline ends with the decoder. In a reference cycle it would keep
        # its threads and memory until Python collects garbage, and in a forked process that hangs.
        decoder = weakref.proxy(self)
        self._pipeline = build_view_graph(
            lambda: decoder._feed(),  # noqa: PLW0108  a bound method would refer to the decoder
            spec,
            device,
            batch_size=batch_size,
            num_threads=count_cpu_threads(),
            device_id=device.index,
            prefetch_queue_depth=IN_FLIGHT,
        )
        with translate_dali_errors(url):
            self._pipeline.build()
        DECODERS.add(self)
        # last, because nobody could end its thread if building failed
        self._ahead = ReadAhead(add_inputs(batches, spec), BATCHES_AHEAD)

    def _feed(self) -> tuple[Any, ...]:
        """Pass the next batch to DALI, which does not copy it, so it is kept until its output."""
        prepared, inputs = next(self._ahead)
        self._in_flight.append(prepared)
        return inputs

    def close(self) -> None:
        """End the thread that reads ahead, wait for it, and end DALI's pipeline."""
        self._ahead.close()
        self._pipeline = None

    def __iter__(self) -> Iterator[DecodedBatch]:
        return self

    def __next__(self) -> DecodedBatch:
        ahead = self.stage_for_gpu and not self.spec.on_device
        while len(self._started) < 1 + ahead:
            try:
                self._started.append(self._start())
            except Exception as error:  # it is raised after the batches before it
                self._started.append(error)
                break
        batch = self._started.popleft()
        if isinstance(batch, Exception):
            try:
                raise batch
            finally:
                del batch  # the error's traceback keeps this frame, which must not keep the error
        views = [view.wait() if isinstance(view, HostCrops) else view for view in batch.views]
        return DecodedBatch(batch.prepared, views, batch.saliency)

    def _start(self) -> StartedBatch:
        """Take the next batch from DALI, and start to crop its images if DALI does not."""
        if self._pipeline is None:
            raise UserError(
                f"{self.url}: this process was forked while a loader was iterating; iterate it "
                "again here"
            )
        streams = () if self.device.type == "cpu" else (torch.cuda.current_stream(self.device),)
        with translate_dali_errors(self.url, lambda: [batch.encoded for batch in self._in_flight]):
            outputs = list(self._pipeline.run(*streams))
        prepared = self._in_flight.popleft()
        images = [] if self.spec.on_device else to_tensors(outputs.pop(0))
        views: list[Tensor | HostCrops] = []
        saliency = []
        for window in prepared.windows:
            if self.spec.grid is not None:
                saliency.append(to_tensor(outputs.pop(0)).squeeze(-1))
            if self.spec.on_device:
                views.append(to_tensor(outputs.pop(0)))
            else:
                size, interpolation = self.spec.crop_size, self.spec.interpolation
                views.append(HostCrops(images, window, size, interpolation, self.stage_for_gpu))
        return StartedBatch(prepared, views, saliency)


DECODERS: "weakref.WeakSet[Decoder]" = weakref.WeakSet()


def abandon_pipelines() -> None:
    """Give up the pipelines in a forked process, which has none of their threads.

    DALI waits for them even when it deletes a pipeline, so these are never deleted.
    """
    for decoder in DECODERS:
        if decoder._pipeline is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(decoder._pipeline._pipe))
            decoder._pipeline._pipe = decoder._pipeline = None


os.register_at_fork(after_in_child=abandon_pipelines)


def add_inputs(
    batches: Iterator[PreparedBatch], spec: ViewSpec
) -> Iterator[tuple[PreparedBatch, tuple[Any, ...]]]:
    """Yield batches with the inputs of their graph (`source` of `build_view_graph`)."""
    for prepared in batches:
        inputs: list[Any] = [wrap_for_dali(prepared.encoded.images)]
        if spec.grid is not None:
            inputs.append(wrap_for_dali(prepared.encoded.maps))
        if spec.on_device or spec.grid is not None:
            for window in prepared.windows:
                inputs += [np.ascontiguousarray(window[:, :2]), np.ascontiguousarray(window[:, 2:])]
        yield prepared, tuple(inputs)


def wrap_for_dali(files: Sequence[np.ndarray]) -> TensorListCPU:
    """Return the encoded files of a batch, (bytes,) uint8 each, as DALI's type, without a copy.

    DALI takes arrays too, but would wrap them one by one in the training thread, which slows
    reading by a fifth: only one thread at a time runs Python.
    """
    tensors = [TensorCPU(file) for file in files]
    return TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]


@pipeline_def
def build_view_graph(source: Any, spec: ViewSpec, device: torch.device) -> tuple[Any, ...]:
    """Build the DALI graph that decodes a batch's images and maps and crops what `spec` asks for.

    The outputs are the decoded images unless the graph crops them; then for each view its saliency
    (if there is a grid) and the view itself (if the graph crops).

    Args:
        source: returns the inputs of a batch: encoded images; encoded maps if there is a grid; and
            start and end of each view's window if the graph crops images or maps.
    """
    windows = spec.views if spec.on_device or spec.grid is not None else 0
    inputs = list(
        fn.external_source(
            source=source,
            num_outputs=1 + (spec.grid is not None) + 2 * windows,
            batch=True,
            no_copy=True,
        )
    )
    runs_on_gpu = device.type == "cuda"
    decoder = "mixed" if runs_on_gpu else "cpu"
    image = fn.decoders.image(
        inputs.pop(0),
        device=decoder,
        output_type=types.RGB,
        hw_decoder_load=HARDWARE_DECODER_LOAD,
    )
    outputs = [] if spec.on_device else [image]
    if spec.grid is not None:
        saliency = fn.decoders.image(inputs.pop(0), output_type=types.GRAY)
    for _ in range(windows):
        start, end = inputs.pop(0), inputs.pop(0)
        if spec.grid is not None:
            cells = crop_window(saliency, start, end, spec.grid, "bilinear", dtype=types.FLOAT)
            outputs.append(cells.gpu() if runs_on_gpu else cells)
        if spec.on_device:
            outputs.append(crop_window(image, start, end, spec.crop_size, spec.interpolation))
    return tuple(outputs)


def crop_window(
    image: Any, start: Any, end: Any, side: int, interpolation: Interpolation, **options: Any
) -> Any:
    """Crop, resize to side x side (antialiased) and flip, in one operator.

    Args:
        start, end: (y, x) as fractions of the image; start x > end x if flipped.
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


def to_tensor(output: Any) -> Tensor:
    """Return an output of uniform shape as a tensor, without a copy."""
    return torch.from_dlpack(output.as_tensor())


def to_tensors(output: Any) -> list[Tensor]:
    """Return an output of varying shapes as one tensor per sample, without a copy."""
    return [torch.from_dlpack(sample) for sample in output]
