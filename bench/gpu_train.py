"""Measure the training step on this machine: time alone and fed, kernels, waits and memory.

`bench.gpu_session` runs this. Besides the packages of the loader it needs torchvision, and tyro and
safetensors, which `train` imports.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from bench.fed_step import measure_fed_step
from bench.table import repeat_forever
from pipeline import MaskedViews, get_recipe, graph
from train.config import TrainConfig, resolve_config
from train.data import SyntheticViews, split_batch
from train.methods import MoCoConfig, Setup
from train.training_step import TrainingStep, prepare_model_

MOST_EXPENSIVE = 15

DECODERS: dict[str, dict[str, Any]] = {
    "the GPU's JPEG decoder alone": {},
    "the CPU": {"decode_on": "cpu"},
}
"""Options of the loader with which decoding leaves the GPU's multiprocessors to the step."""


@dataclass(frozen=True)
class Settings:
    """Size of the measurement: MoCo v2 with the recipe `hp`; the defaults are for a GPU."""

    encoder: str = "resnet50"
    batch_sizes: tuple[int, ...] = (256, 32)
    crop_size: int = 224
    queue: int = 65_536
    warmup: int = 5
    steps: int = 20

    @classmethod
    def small(cls) -> "Settings":
        return cls("resnet18", (4,), 56, queue=64, warmup=1, steps=2)


def measure(url: str, device: torch.device, settings: Settings) -> Iterator[str]:
    """Measure a step at each batch size; yield each line to print as soon as it is measured.

    Raises:
        AssertionError: after the last line, if the host waits for the GPU.
    """
    problems: list[str] = []
    for size in settings.batch_sizes:
        step, config = build(size, device, settings)
        synthetic = SyntheticViews(10 * size, config.recipe, size, device, 1, 0)
        endless = repeat_forever(synthetic)
        reset_memory(device)
        alone = time_steps(step, endless, device, settings)
        with closing(MaskedViews(url, config.recipe, size, device=device.type)) as views:
            fed_batches = repeat_forever(views)
            fed = time_steps(step, fed_batches, device, settings)
            yield (
                f"batch {size}: {alone:.1f} ms per step alone, {fed:.1f} ms fed, alone/fed "
                f"{alone / fed:.3f}, {1e3 * size / fed:.0f} images/s{format_peak_memory(device)}"
            )
            split = measure_fed_step(step, fed_batches, device, settings.warmup, settings.steps)
            yield f"batch {size}: {split.describe()}"
            if device.type == "cuda":
                yield f"batch {size}: {time_on_urgent_stream(step, fed_batches, settings)}"
                yield from compare_decoders(url, step, config, alone, settings)
            loading, in_calls = time_loader(fed_batches, device, settings)
            yield (
                f"batch {size}: {loading:.1f} ms per batch of the loader alone; {in_calls:.1f} of "
                "them the host spends in the call"
            )
            if device.type == "cuda":
                waits = count_waits(step, fed_batches)
                yield f"batch {size}: {len(waits)} waits of the host in a fed step"
                if waits:
                    places = "; ".join(sorted(set(waits)))
                    problems.append(f"batch {size}: the host waits: {places}")
            if size == settings.batch_sizes[0]:
                yield from profile_kernels(step, fed_batches, device)
    assert not problems, "; ".join(problems)


def time_on_urgent_stream(step: TrainingStep, batches: Iterable, settings: Settings) -> str:
    """Split the time of a fed step on a stream that the GPU prefers to the decoder's streams.

    Its kernels get free multiprocessors first, so the decoder, which works two batches ahead, takes
    what they leave.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    urgent = torch.cuda.Stream(device, priority=-1)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # memory that another stream has used is not used by this one
    with torch.cuda.stream(urgent):
        split = measure_fed_step(step, batches, device, settings.warmup, settings.steps)
    torch.cuda.empty_cache()
    return f"on a stream of high priority {split.describe()}"


def compare_decoders(
    url: str, step: TrainingStep, config: TrainConfig, alone: float, settings: Settings
) -> Iterator[str]:
    """Yield the time of a step fed by views that do not use the GPU's multiprocessors to decode.

    Args:
        alone: milliseconds of a step that no loader feeds.
    """
    size, device = config.batch_size, torch.device("cuda")
    for decoder, options in DECODERS.items():
        with (
            patch.object(graph, "HARDWARE_DECODER_LOAD", 1.0),
            closing(MaskedViews(url, config.recipe, size, device="cuda", **options)) as views,
        ):
            batches = repeat_forever(views)
            took = time_steps(step, batches, device, settings)
        yield (
            f"batch {size}: {took:.1f} ms fed by views decoded by {decoder}, alone/fed "
            f"{alone / took:.3f}"
        )


def build(size: int, device: torch.device, settings: Settings) -> tuple[TrainingStep, TrainConfig]:
    """Build the step of MoCo v2."""
    recipe = replace(get_recipe("hp"), crop_size=settings.crop_size)
    config = TrainConfig(
        data="",
        out="",
        method=MoCoConfig(queue=settings.queue),
        recipe=recipe,
        encoder=settings.encoder,
        crop_size=settings.crop_size,
        batch_size=size,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    config = resolve_config(config, device)
    setup = Setup(encoder=config.encoder, batch_size=size, crop_size=settings.crop_size)
    torch.backends.cudnn.benchmark = True  # as in the training loop
    method = prepare_model_(config.method.build(setup), config, device)
    return TrainingStep(method, config, device), config


def time_steps(
    step: Callable[[Any, float], Any], batches: Iterable, device: torch.device, settings: Settings
) -> float:
    """Return the mean time of a step, after a warm-up."""
    stream = iter(batches)
    for _ in range(settings.warmup):
        step(split_batch(next(stream), 1), 1e-3)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(settings.steps):
        step(split_batch(next(stream), 1), 1e-3)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / settings.steps


def time_loader(batches: Iterable, device: torch.device, settings: Settings) -> tuple[float, float]:
    """Return the mean time of a batch that nothing uses, and the part until the call returns.

    The first limits a step that is shorter than it. During the second, the host cannot launch the
    step's kernels; waiting for a slower decoder is part of it.
    """
    stream = iter(batches)
    for _ in range(settings.warmup):
        next(stream)
    synchronize(device)
    start, in_calls = time.perf_counter(), 0.0
    for _ in range(settings.steps):
        begin = time.perf_counter()
        next(stream)
        in_calls += time.perf_counter() - begin
        synchronize(device)
    total = time.perf_counter() - start
    return 1e3 * total / settings.steps, 1e3 * in_calls / settings.steps


def count_waits(step: TrainingStep, batches: Iterable) -> list[str]:
    """Return the places in a fed step where the host waits for the GPU, from torch's warnings."""
    stream = iter(batches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(split_batch(next(stream), 1), 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [
        f"{message.filename}:{message.lineno}"
        for message in caught
        if str(message.message).startswith("called a synchronizing")
    ]


def profile_kernels(step: TrainingStep, batches: Iterable, device: torch.device) -> list[str]:
    """Return the most expensive kernels of a fed step; on a CPU the most expensive operators."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    stream = iter(batches)
    with profile(activities=activities) as profiler:
        step(split_batch(next(stream), 1), 1e-3)
        synchronize(device)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    if on_gpu:  # without the operators, whose time is that of their kernels
        on_device = torch.autograd.DeviceType.CUDA
        averages = [
            row for row in averages if row.device_type == on_device and not row.is_user_annotation
        ]
    rows = sorted(averages, key=lambda row: getattr(row, name), reverse=True)
    total = sum(getattr(row, name) for row in rows)
    return [f"the {MOST_EXPENSIVE} most expensive of {total / 1e3:.1f} ms in a fed step:"] + [
        f"  {getattr(row, name) / 1e3:8.2f} ms {row.count:5d} x  {row.key[:90]}"
        for row in rows[:MOST_EXPENSIVE]
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def format_peak_memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    torch_peak = torch.cuda.max_memory_allocated(device)
    return (
        f", peak {torch_peak / 2**30:.1f} GiB in torch, {(total - free) / 2**30:.1f} GiB in use "
        "including DALI"
    )
