"""Ways to train, one class each: fed by synthetic batches, by the loader, by the released code."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn
from torchvision import models

from bench import usual
from bench.table import check_counts
from pipeline import Batch, MaskedViews, get_recipe
from pipeline.rng import BatchRng
from schemas.precision import autocast
from train import trainer
from train.checkpoint import Checkpoints
from train.config import TrainConfig, resolve_config
from train.data import BatchStream, SyntheticViews
from train.methods import MethodConfig, MoCoConfig, Setup
from train.metrics_logger import MetricsLogger
from train.presets import PRESETS
from train.trainer import TrainingJob
from train.training_step import TrainingStep, prepare_model_

ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Settings:
    """Options that all ways of training share."""

    data: str = tyro.MISSING
    """Local dataset of shards."""
    encoder: str = "resnet50"
    """Architecture of the encoder."""
    recipe: str = "hp"
    """Name of the recipe of views."""
    crop_size: int = 224
    """Side of a view in pixels."""
    batch_size: int = 256 if ON_GPU else 16
    """Images per step."""
    queue: int = 65_536
    """Number of keys in MoCo's queue."""
    steps: int = 20 if ON_GPU else 2
    """Steps per repeat."""
    repeats: int = 5
    """Number of repeats, after a first one that is not counted."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Number of worker processes of the released way."""
    device: Literal["cpu", "cuda"] = "cuda" if ON_GPU else "cpu"
    """Device of the training: cpu or cuda."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "queue", "steps", "repeats", "crop_size")


class Trainer:
    """One way to train: an encoder, fed by `batches`.

    Args:
        preset: preset of the method and optimizer; masks are those of `options.recipe` for MoCo,
            otherwise none.
        method: method to use in place of the preset's.
        plain: True for NCHW memory, as in the released code.
        changes: options that replace those of the preset.
    """

    def __init__(
        self,
        options: Settings,
        batches: Callable[..., Any],
        *,
        preset: str = "moco",
        method: MethodConfig | None = None,
        plain: bool = False,
        **changes: Any,
    ) -> None:
        device = torch.device(options.device)
        start = PRESETS[preset]
        recipe = get_recipe(options.recipe if preset == "moco" else "none")
        method = method or start.config.method
        if isinstance(method, MoCoConfig):
            method = replace(method, queue=options.queue)
        config = replace(
            start.config,
            data=options.data,
            method=method,
            recipe=replace(recipe, crop_size=options.crop_size, **start.views),
            encoder=options.encoder,
            batch_size=options.batch_size,
            device=options.device,
            **{"out": "", **changes},
        )
        self.config: TrainConfig = resolve_config(config, device)
        setup = Setup(
            encoder=options.encoder,
            batch_size=options.batch_size,
            crop_size=options.crop_size,
            classes=1000,
        )
        model = prepare_model_(self.config.method.build(setup), self.config, device)
        if plain:
            model = model.to(memory_format=torch.contiguous_format)
        self.step = TrainingStep(model, self.config, device)
        self.views = batches(options, self.config, device)
        self.stream = BatchStream(self.views, memory=1)
        self.waited = 0.0

    def run(self, steps: int) -> int:
        """Train and return the number of images."""
        scalars: dict[str, torch.Tensor] = {}
        for _ in range(steps):
            scalars = self.step(self.stream.next_micro_batches(1), lr=1e-3)
            self.waited += self.stream.waited
        float(scalars["loss"])  # synchronizes, as the training loop does occasionally
        return steps * self.config.batch_size


class WholeJob(Trainer):
    """A trainer driven by the actual training loop, which writes its logs into `folder`."""

    def __init__(self, options: Settings, folder: Path) -> None:
        super().__init__(options, open_shards, out=str(folder))
        job = EndlessEpoch(
            user_config=self.config,
            config=self.config,
            device=torch.device(options.device),
            data_name="",
            data_digest="",
            method=self.step.method,
            views=self.views,
        )
        logger = MetricsLogger(folder, start=0, total=job.total_steps, epoch_steps=job.epoch_steps)
        checkpoints = Checkpoints(folder=folder / "checkpoints", keep=1, settings={})
        self.loop = trainer.Trainer(job, self.step, checkpoints, logger)
        self.done = 0

    def run(self, steps: int) -> int:
        for _ in range(steps):
            self.done += 1
            with redirect_stdout(io.StringIO()):  # hides its log lines
                self.loop.run(self.done, self.done)
            self.waited += self.loop.stream.waited
        return steps * self.config.batch_size


class EndlessEpoch(TrainingJob):
    """A job that never leaves its first epoch: work done once per epoch would weigh too much here.

    That is a checkpoint, a picture of the views, and an evaluation.
    """

    @property
    def epoch_steps(self) -> int:
        return 1 << 40


def make_synthetic_views(
    options: Settings, config: TrainConfig, device: torch.device
) -> SyntheticViews:
    return SyntheticViews(1 << 20, config.recipe, options.batch_size, device, 1, 0)


def make_contiguous_views(
    options: Settings, config: TrainConfig, device: torch.device
) -> SyntheticViews:
    """Return synthetic views whose images are in NCHW memory."""
    views = make_synthetic_views(options, config, device)
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


def open_shards(options: Settings, config: TrainConfig, device: torch.device) -> MaskedViews:
    return MaskedViews(options.data, config.recipe, options.batch_size, device.type)


class OnlineViews:
    """The loader without stored saliency: a ResNet-50 computes it for query and key in each step.

    It runs at the trainer's own precision, in channels_last, with vectorized masks: the best case
    of online saliency.
    """

    def __init__(self, options: Settings, config: TrainConfig, device: torch.device) -> None:
        self.recipe, self.config, self.device = config.recipe, config, device
        plain = replace(config.recipe, fill="none", hard_negatives=0)
        self.views = MaskedViews(options.data, plain, options.batch_size, device.type)
        network = models.resnet50(weights=None)  # the speed does not depend on its weights
        body = nn.Sequential(*list(network.children())[:-2]).to(device).eval()
        self.body = body.to(memory_format=torch.channels_last)

    def __iter__(self) -> Iterator[Batch]:
        for step, batch in enumerate(self.views):
            assert batch.key is not None
            rng = BatchRng(0, step, np.arange(len(batch.query)), self.device)
            views = {"query": batch.query, "key": batch.key}
            with torch.no_grad(), autocast(self.config.precision, self.device):
                maps = {
                    f"{name}_saliency": nn.functional.adaptive_avg_pool2d(
                        self.body(view).sum(1).float(), self.recipe.grid
                    )
                    for name, view in views.items()
                }
            query, key, hard = usual.make_views_vectorized({**views, **maps}, self.recipe, rng)
            yield replace(batch, query=query, key=key, hard_negative=hard)


class ReleasedViews:
    """PIL in worker processes, fp32 saliency online, masks by loops (see `bench.usual`)."""

    def __init__(
        self, folder: Path, options: Settings, config: TrainConfig, device: torch.device
    ) -> None:
        self.recipe, self.device = config.recipe, device
        self.localizer = usual.Localizer(device.type, config.recipe.grid)
        self.batches = usual.load_folder(
            folder, config.recipe, options.batch_size, options.workers, tensors=False
        )
        next(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for views in self.batches:
            moved = {n: view.to(self.device, non_blocking=True) for n, view in views.items()}
            query, key, hard = usual.make_views_by_loops(moved, self.recipe, self.localizer)
            label = torch.zeros(len(query), dtype=torch.long, device=self.device)
            yield Batch(query=query, key=key, hard_negative=hard, label=label)
