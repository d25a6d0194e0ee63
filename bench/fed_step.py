"""Split the time of a fed training step into the step itself and what lies between two steps."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch

from train.data import split_batch
from train.training_step import TrainingStep

Mark = torch.cuda.Event | float
"""A moment: on a GPU an event in the stream of the training, on a CPU the seconds of a clock."""


@dataclass(frozen=True)
class FedStep:
    """Milliseconds of a fed step, each the median of several steps.

    Attributes:
        step: the training step on the device. If it is longer than a step that no loader feeds,
            decoding slows its kernels, or the host launches them too late.
        between: from the end of a step to the end of the next batch's views, on the device: the
            views' kernels, and waiting for the decoder or for the host.
        host_loading: the host in the loader's call.
        host_launching: the host in the step's call.
        idle_starts: number of steps at whose start the device had finished all earlier work; it
            then waits for the host.
        steps: number of steps measured.
    """

    step: float
    between: float
    host_loading: float
    host_launching: float
    idle_starts: int
    steps: int

    def describe(self) -> str:
        return (
            f"a fed step is {self.step:.1f} ms, and {self.between:.1f} ms between two steps "
            f"(medians); the host spends {self.host_loading:.1f} ms in the loader's call and "
            f"{self.host_launching:.1f} ms launching; the device was idle at {self.idle_starts} of "
            f"{self.steps} starts"
        )


def measure_fed_step(
    step: TrainingStep, batches: Iterable, device: torch.device, warmup: int, steps: int
) -> FedStep:
    """Make steps without waiting for the device in between, and split their time."""
    stream = iter(batches)
    for _ in range(warmup):
        step(split_batch(next(stream), 1), 1e-3)
    ends, fed = [mark(device)], []
    loading, launching, idle_starts = [], [], 0
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(stream)
        loading.append(time.perf_counter() - start)
        idle_starts += is_over(ends[-1])
        fed.append(mark(device))
        start = time.perf_counter()
        step(split_batch(batch, 1), 1e-3)
        launching.append(time.perf_counter() - start)
        ends.append(mark(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return FedStep(
        step=median(map(count_milliseconds, fed, ends[1:])),
        between=median(map(count_milliseconds, ends, fed)),
        host_loading=1e3 * median(loading),
        host_launching=1e3 * median(launching),
        idle_starts=idle_starts,
        steps=steps,
    )


def mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def is_over(moment: Mark) -> bool:
    """Return whether the device has reached a mark; a CPU always has."""
    return isinstance(moment, float) or moment.query()


def count_milliseconds(first: Mark, second: Mark) -> float:
    """Return the time between two marks that the device has reached."""
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return 1e3 * (second - first)
    return first.elapsed_time(second)
