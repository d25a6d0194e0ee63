"""Measure training steps: alone, fed by the loader, with online saliency, the released way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.loader import synchronize, write_folder
from bench.table import Row, Way
from bench.trainers import (
    OnlineViews,
    ReleasedViews,
    Settings,
    Trainer,
    WholeJob,
    make_contiguous_views,
    make_synthetic_views,
)
from schemas.cli import lookup
from train.methods import ADIOSConfig, SimCLRConfig

ALONE, JOB, ONLINE = "step alone", "the whole job", "saliency online"
FP32, RELEASED = "step alone, fp32 NCHW", "the released way"
SUPERVISED, COMPILED = "supervised step alone", "step alone, compiled"
SIMCLR, ADIOS_S, ADIOS = "simclr step alone", "adios-s step alone", "adios step alone, 4 masks"
AHEAD = {JOB: 3, ONLINE: 3}
"""Number of steps that use up the batches DALI has prefetched; a DataLoader's queue lasts for less
than a step.
"""
SIMCLR_OF_ADIOS = SimCLRConfig(hidden=ADIOSConfig().hidden)
PAIR, IMAGE = 5, 3
"""Forward passes of an encoder per image and step, a backward counted as two: for a pair with a
hard negative (query forward and backward, two momentum forwards), and for supervised training.
"""


@dataclass(frozen=True)
class Options(Settings):
    """Measure images/s of MoCo v2 with hard negatives in several ways, in one run."""

    out: Path = Path("out/bench-train.json")
    """JSON file for the figures."""
    rows: tuple[str, ...] = (ALONE, JOB, ONLINE, FP32, RELEASED, SUPERVISED)
    """Rows to measure."""


def build_trainers(options: Options, folder: Path) -> dict[str, Trainer]:
    """Return a trainer per row; rows that need image files find them in `folder`."""
    torch.backends.cudnn.benchmark = True  # as in the training loop and in the released code
    (folder / "run").mkdir()
    released: dict[str, Any] = dict(precision="fp32", plain=True)
    makers: dict[str, Callable[[], Trainer]] = {
        RELEASED: lambda: Trainer(
            options, lambda *args: ReleasedViews(folder / "images", *args), **released
        ),
        ALONE: lambda: Trainer(options, make_synthetic_views),
        JOB: lambda: WholeJob(options, folder / "run"),
        ONLINE: lambda: Trainer(options, OnlineViews),
        FP32: lambda: Trainer(options, make_contiguous_views, **released),
        SUPERVISED: lambda: Trainer(options, make_synthetic_views, preset="supervised"),
        SIMCLR: lambda: Trainer(
            options, make_synthetic_views, preset="adios", method=SIMCLR_OF_ADIOS
        ),
        ADIOS_S: lambda: Trainer(options, make_synthetic_views, preset="adios"),
        ADIOS: lambda: Trainer(
            options, make_synthetic_views, preset="adios", method=ADIOSConfig(single=False)
        ),
        COMPILED: lambda: Trainer(options, make_synthetic_views, compile=True),
    }
    for name in options.rows:
        lookup("row", name, makers)
    if RELEASED in options.rows:
        (folder / "images").mkdir()
        write_folder(options.data, folder / "images")
    # The released way comes first: it is best to fork its workers before DALI's threads exist.
    return {name: makers[name]() for name in makers if name in options.rows}


def make_ways(options: Options, row_trainers: Mapping[str, Trainer]) -> dict[str, Way]:
    """Return the ways to time; steps before the clock starts use up prefetched batches."""

    def make_way(trainer: Trainer, ahead: int) -> Way:
        def run() -> int:
            images = trainer.run(options.steps)
            synchronize()
            return images

        def settle() -> None:
            if ahead:
                trainer.run(ahead)
            trainer.waited = 0.0
            synchronize()

        return Way(run, settle)

    return {name: make_way(row_trainers[name], AHEAD.get(name, 0)) for name in row_trainers}


def summarize(rows: list[Row], waits: Mapping[str, float]) -> list[str]:
    """Return the ratios for which the project has goals."""
    median = {row.name: row.median for row in rows}

    def format_ratio(numerator: str, denominator: str, text: str, factor: float = 1.0) -> list[str]:
        if numerator in median and denominator in median:
            return [f"{text}: {factor * median[numerator] / median[denominator]:.3f}"]
        return []

    return [
        *format_ratio(
            JOB, ALONE, "the whole job over the step alone (goal 0.98 on a GPU, 0.95 on a CPU)"
        ),
        *format_ratio(JOB, ONLINE, "stored saliency over online saliency (goal 1.35)"),
        *format_ratio(JOB, RELEASED, "the whole job over the released way (goal 4)"),
        *format_ratio(ALONE, FP32, "bf16 channels_last over fp32 NCHW"),
        *format_ratio(ALONE, COMPILED, "eager over compiled"),
        *format_ratio(SIMCLR, ADIOS_S, "simclr over adios-s (counted: 9 / 6 = 1.5 and two U-Nets)"),
        *format_ratio(SIMCLR, ADIOS, "simclr over adios with 4 masks (counted: 36 / 6 = 6)"),
        *format_ratio(
            ALONE,
            SUPERVISED,
            "pairs/s over what a supervised step allows, 5 forwards against 3 (goal 0.75)",
            PAIR / IMAGE,
        ),
        *[f"{name}: {share:.1%} of the time waiting for data" for name, share in waits.items()],
    ]


def compute_wait_shares(
    row_trainers: Mapping[str, Trainer], rows: list[Row], options: Options
) -> dict[str, float]:
    """Return the share of the last repeat's time in which a row waited for its data."""
    seconds = {row.name: options.steps * options.batch_size / row.rates[-1] for row in rows}
    return {
        name: row_trainers[name].waited / seconds[name] for name in (JOB,) if name in row_trainers
    }
