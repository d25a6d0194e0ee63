"""Measure the training step with compiled encoders, alone and fed, with and without CUDA graphs."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torchvision.models import ResNet

from bench.gpu_train import Settings, build, time_steps
from bench.table import repeat_forever
from pipeline import MaskedViews
from pipeline.compiling import find_compile_obstacle
from train.data import SyntheticViews
from train.training_step import TrainingStep


def measure(url: str, device: torch.device, settings: Settings) -> Iterator[str]:
    """Yield a line for each batch size and way to compile, as soon as it is measured.

    Raises:
        AssertionError: PyTorch cannot compile for this device.
    """
    obstacle = find_compile_obstacle(device)
    assert obstacle is None, f"PyTorch cannot compile: {obstacle}"
    for size in reversed(settings.batch_sizes):  # in the smallest, launching kernels takes most
        for name, compile_ in WAYS.items():
            try:
                alone, fed = time_compiled(url, size, device, settings, compile_)
            except Exception as error:  # the other ways are worth measuring
                yield f"batch {size}, {name}: fails: {type(error).__name__}: {error}"
            else:
                yield (
                    f"batch {size}, {name}: {alone:.1f} ms per step alone, {fed:.1f} ms fed, "
                    f"alone/fed {alone / fed:.3f}"
                )


def time_compiled(
    url: str,
    size: int,
    device: torch.device,
    settings: Settings,
    compile_: Callable[[TrainingStep], None],
) -> tuple[float, float]:
    """Return the milliseconds of a step alone and fed, with encoders compiled by `compile_`."""
    step, config = build(size, device, settings)
    step.method.to(device)  # also the counters of batches, as `--compile` leaves them there
    compile_(step)

    def start_step(micro_batches: Any, lr: float) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return step(micro_batches, lr)

    synthetic = SyntheticViews(10 * size, config.recipe, size, device, 1, 0)
    batches = repeat_forever(synthetic)
    alone = time_steps(start_step, batches, device, settings)
    with closing(MaskedViews(url, config.recipe, size, device=device.type)) as views:
        fed_batches = repeat_forever(views)
        return alone, time_steps(start_step, fed_batches, device, settings)


def compile_encoders_(step: TrainingStep, **options: Any) -> None:
    """Compile the encoders of a step in place, as `--compile` does."""
    for module in step.method.modules():
        if isinstance(module, ResNet):
            module.compile(**options)


WAYS: dict[str, Callable[[TrainingStep], None]] = {
    "compiled": compile_encoders_,
    "compiled, with CUDA graphs": lambda step: compile_encoders_(step, mode="reduce-overhead"),
}
