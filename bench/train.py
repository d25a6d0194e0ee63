"""Rates of training steps: alone, fed by the loader, with online saliency, and the released way."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torchvision import models

from bench import usual
from bench.loader import synchronise, write_folder
from bench.table import Row, Way
from pipeline import RECIPES, Batch, MaskedViews
from pipeline.draws import Draws
from train.config import TrainConfig, autocast, resolved
from train.feed import Feed, SyntheticViews
from train.methods import ADIOSConfig, MoCoConfig, Setup, SimCLRConfig
from train.presets import PRESETS
from train.step import Step, placed

ON_GPU = torch.cuda.is_available()

ALONE, JOB, ONLINE = "step alone", "the whole job", "saliency online"
FP32, RELEASED = "step alone, fp32 NCHW", "the released way"
SUPERVISED, COMPILED = "supervised step alone", "step alone, compiled"
SIMCLR, ADIOS_S, ADIOS = "simclr step alone", "adios-s step alone", "adios step alone, 4 masks"
AHEAD = {JOB: 3, ONLINE: 3}
"""Steps that use up what DALI has made ahead; a DataLoader's queue lasts for less than a step."""
SIMCLR_OF_ADIOS = SimCLRConfig(hidden=ADIOSConfig().hidden)
PAIR, IMAGE = 5, 3
"""Forwards of an encoder that a step costs an image, a backward counted as two: a pair with a hard
negative (query forward and backward, two momentum forwards), and supervised training."""


@dataclass(frozen=True)
class Options:
    """Images/s of MoCo v2 with hard negatives in several ways, in one run."""

    data: str = tyro.MISSING
    """A local dataset of shards."""
    out: Path = Path("out/bench-train.json")
    """Where the figures are written."""
    rows: tuple[str, ...] = (ALONE, JOB, ONLINE, FP32, RELEASED, SUPERVISED)
    """What to measure."""
    encoder: str = "resnet50"
    """Of the method."""
    recipe: str = "hp"
    """Of the views."""
    crop_size: int = 224
    """Side of a view in pixels."""
    batch_size: int = 256 if ON_GPU else 16
    """Images a step."""
    queue: int = 65_536
    """Keys that MoCo remembers."""
    steps: int = 20 if ON_GPU else 2
    """Steps a repeat."""
    repeats: int = 5
    """Repeats, after one that is not counted."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Worker processes of the released way."""
    device: Literal["cpu", "cuda"] = "cuda" if ON_GPU else "cpu"
    """cpu or cuda."""


class Trainer:
    """One way to train: an encoder of its own, fed by `batches`.

    Args:
        preset: whose method and optimiser; masks are those of `options.recipe` for MoCo, else none.
        method: in place of the preset's.
        plain: NCHW memory, as the released code has it.
        changes: of the preset's options.
    """

    def __init__(
        self,
        options: Options,
        batches: Callable[..., Any],
        *,
        preset: str = "moco",
        method: Any = None,
        plain: bool = False,
        **changes: Any,
    ) -> None:
        device = torch.device(options.device)
        start = PRESETS[preset]
        recipe = RECIPES[options.recipe if preset == "moco" else "none"]
        method = method or start.config.method
        if isinstance(method, MoCoConfig):
            method = replace(method, queue=options.queue)
        config = replace(
            start.config,
            data=options.data,
            out="",
            method=method,
            recipe=replace(recipe, crop_size=options.crop_size, **start.views),
            encoder=options.encoder,
            batch_size=options.batch_size,
            device=options.device,
            **changes,
        )
        self.config: TrainConfig = resolved(config, device)
        setup = Setup(
            encoder=options.encoder,
            batch_size=options.batch_size,
            crop_size=options.crop_size,
            classes=1000,
        )
        made = placed(self.config.method.build(setup), self.config, device)
        if plain:
            made = made.to(memory_format=torch.contiguous_format)
        self.step = Step(made, self.config, device)
        self.feed = Feed(batches(options, self.config, device), memory=1)
        self.waited = 0.0

    def run(self, steps: int) -> int:
        """Train; returns images."""
        scalars: dict[str, torch.Tensor] = {}
        for _ in range(steps):
            scalars = self.step(self.feed.parts(1), lr=1e-3)
            self.waited += self.feed.waited
        float(scalars["loss"])  # as the loop does now and then
        return steps * self.config.batch_size


def synthetic(options: Options, config: TrainConfig, device: torch.device) -> SyntheticViews:
    return SyntheticViews(1 << 20, config.recipe, options.batch_size, device, 1, 0)


def contiguous(options: Options, config: TrainConfig, device: torch.device) -> SyntheticViews:
    """The same with images in NCHW memory."""
    views = synthetic(options, config, device)
    batch = views.batch
    assert batch.key is not None
    hard = batch.hard_negative
    views.batch = replace(
        batch,
        query=batch.query.contiguous(),
        key=batch.key.contiguous(),
        hard_negative=None if hard is None else hard.contiguous(),
    )
    return views


def from_shards(options: Options, config: TrainConfig, device: torch.device) -> MaskedViews:
    return MaskedViews(options.data, config.recipe, options.batch_size, device.type)


class OnlineViews:
    """Our loader without its saliency: a ResNet-50 finds it for query and key in every step.

    At the trainer's own precision, in channels_last, with vectorised masks: the best of this way.
    """

    def __init__(self, options: Options, config: TrainConfig, device: torch.device) -> None:
        self.recipe, self.config, self.device = config.recipe, config, device
        plain = replace(config.recipe, fill="none", hard_negatives=0)
        self.views = MaskedViews(options.data, plain, options.batch_size, device.type)
        network = models.resnet50(weights=None)  # the speed does not depend on its weights
        body = nn.Sequential(*list(network.children())[:-2]).to(device).eval()
        self.body = body.to(memory_format=torch.channels_last)
        self.draws = Draws(0, device)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.views:
            assert batch.key is not None
            found = {"query": batch.query, "key": batch.key}
            with torch.no_grad(), autocast(self.config.precision, self.device):
                maps = {
                    f"{name}_saliency": nn.functional.adaptive_avg_pool2d(
                        self.body(view).sum(1).float(), self.recipe.grid
                    )
                    for name, view in found.items()
                }
            query, key, hard = usual.vectorised({**found, **maps}, self.recipe, self.draws)
            yield replace(batch, query=query, key=key, hard_negative=hard)


class ReleasedViews:
    """PIL in worker processes, fp32 saliency online, masks by loops (see `bench.usual`)."""

    def __init__(self, folder: Path, options: Options, config: TrainConfig, device: Any) -> None:
        self.recipe, self.device = config.recipe, device
        self.localiser = usual.Localiser(device.type, config.recipe.grid)
        self.batches = usual.from_folder(
            folder, config.recipe, options.batch_size, options.workers, tensors=False
        )
        next(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for views in self.batches:
            moved = {n: view.to(self.device, non_blocking=True) for n, view in views.items()}
            query, key, hard = usual.looped(moved, self.recipe, self.localiser)
            label = torch.zeros(len(query), dtype=torch.long, device=self.device)
            yield Batch(query=query, key=key, hard_negative=hard, label=label)


def trainers(options: Options, folder: Path) -> dict[str, Trainer]:
    """A trainer a row; `folder` is filled with the dataset's images where a row needs them."""
    released: dict[str, Any] = dict(precision="fp32", plain=True)
    makers: dict[str, Callable[[], Trainer]] = {
        RELEASED: lambda: Trainer(
            options, lambda *given: ReleasedViews(folder, *given), **released
        ),
        ALONE: lambda: Trainer(options, synthetic),
        JOB: lambda: Trainer(options, from_shards),
        ONLINE: lambda: Trainer(options, OnlineViews),
        FP32: lambda: Trainer(options, contiguous, **released),
        SUPERVISED: lambda: Trainer(options, synthetic, preset="supervised"),
        SIMCLR: lambda: Trainer(options, synthetic, preset="adios", method=SIMCLR_OF_ADIOS),
        ADIOS_S: lambda: Trainer(options, synthetic, preset="adios"),
        ADIOS: lambda: Trainer(
            options, synthetic, preset="adios", method=ADIOSConfig(single=False)
        ),
        COMPILED: lambda: Trainer(options, synthetic, compile=True),
    }
    if RELEASED in options.rows:
        write_folder(options.data, folder)
    # the released way first: its workers are forked, best before DALI's threads exist
    return {name: makers[name]() for name in makers if name in options.rows}


def ways(options: Options, made: Mapping[str, Trainer]) -> dict[str, Way]:
    """What to time. Before the clock starts, steps use up the batches that were made ahead."""

    def way(trainer: Trainer, ahead: int) -> Way:
        def run() -> int:
            images = trainer.run(options.steps)
            synchronise()
            return images

        def settle() -> None:
            if ahead:
                trainer.run(ahead)
            trainer.waited = 0.0
            synchronise()

        return Way(run, settle)

    return {name: way(made[name], AHEAD.get(name, 0)) for name in made}


def summary(rows: list[Row], waits: Mapping[str, float]) -> list[str]:
    """The ratios that the project's goals are about."""
    median = {row.name: row.median for row in rows}

    def times(one: str, other: str, text: str, factor: float = 1.0) -> list[str]:
        if one in median and other in median:
            return [f"{text}: {factor * median[one] / median[other]:.3f}"]
        return []

    return [
        *times(JOB, ALONE, "the whole job over the step alone (goal 0.98 on a GPU, 0.95 on a CPU)"),
        *times(JOB, ONLINE, "stored saliency over online saliency (goal 1.35)"),
        *times(JOB, RELEASED, "the whole job over the released way (goal 4)"),
        *times(ALONE, FP32, "bf16 channels_last over fp32 NCHW"),
        *times(ALONE, COMPILED, "as it is over compiled"),
        *times(SIMCLR, ADIOS_S, "simclr over adios-s (counted: 9 / 6 = 1.5 and two U-Nets)"),
        *times(SIMCLR, ADIOS, "simclr over adios with 4 masks (counted: 36 / 6 = 6)"),
        *times(
            ALONE,
            SUPERVISED,
            "pairs/s over what a supervised step allows, 5 forwards against 3 (goal 0.75)",
            PAIR / IMAGE,
        ),
        *[f"{name}: {share:.1%} of the time waiting for data" for name, share in waits.items()],
    ]


def shares(made: Mapping[str, Trainer], rows: list[Row], options: Options) -> dict[str, float]:
    """The share of the last repeat's time that a row waited for its data."""
    seconds = {row.name: options.steps * options.batch_size / row.rates[-1] for row in rows}
    return {name: made[name].waited / seconds[name] for name in (JOB,) if name in made}
