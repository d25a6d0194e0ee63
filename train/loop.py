"""The training loop: the same lines for one process and for many."""

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import Cache, MaskedViews
from schemas import ShardDataset, UserError
from schemas.cli import TerminatedError
from train.checkpoint import Checkpoints
from train.config import TrainConfig, autocast, resolved, settings_of
from train.describe import introduction, metadata_of, write_config
from train.distributed import fail, is_main, pick_device, rank, together, world_size
from train.encoders import save_encoder
from train.interrupt import STATUS, Interrupt
from train.meter import Meter
from train.methods import Method, method_of
from train.optim import build_sgd, learning_rate
from train.record import Record


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank trains with."""

    config: TrainConfig  # with everything decided
    device: torch.device
    dataset: ShardDataset
    method: Method
    views: MaskedViews

    @property
    def epoch_steps(self) -> int:
        return len(self.views)

    @property
    def total_steps(self) -> int:
        return self.epoch_steps * self.config.epochs


def train(config: TrainConfig) -> Path:
    """Pretrain as `config` says, or go on where an earlier run in its folder was; on all ranks.

    Returns:
        The file of the trained encoder.

    Raises:
        UserError: data, options or an earlier run that do not fit; a loss that is not finite; no
            room to save. On rank 0; the other ranks exit with status 2.
        TerminatedError: SIGTERM or SIGUSR1 came, and the state is saved. Likewise.
    """
    with together():
        job = prepare(config)
    config, out = job.config, Path(job.config.out)
    settings = settings_of(config, job.dataset.digest) | {"steps_per_epoch": job.epoch_steps}
    checkpoints = Checkpoints(
        folder=out / "checkpoints", keep=config.keep_checkpoints, settings=settings
    )
    optimizer = build_sgd(job.method, config.momentum, config.weight_decay)
    with together():
        if config.resume == "never" and checkpoints.steps():
            raise UserError(f"{out}: holds the checkpoints of a run; choose another --out")
        step = checkpoints.restore(job.method, optimizer, job.views)
    record = None
    with together():
        if is_main():
            out.mkdir(parents=True, exist_ok=True)
            write_config(out / "config.yaml", settings, config, job.device)
            record = Record(out, start=step, total=job.total_steps, epoch_steps=job.epoch_steps)
            for line in introduction(config, job.method, job.views, job.device):
                record.say(line)
            if step:
                record.say(f"goes on after step {step} of {job.total_steps}")

    interrupt = Interrupt()
    with interrupt.listening():
        run_steps(job, optimizer, checkpoints, record, step, interrupt)

    path = out / "encoder.safetensors"
    with together():
        if record is not None:
            save_encoder(path, job.method.exported(), metadata_of(config, job.dataset))
            record.say(f"encoder: {path}")
            record.close()
    return path


def prepare(config: TrainConfig) -> Job:
    """Decide what was left open, build the method, open the loader."""
    device = pick_device(config.device)
    config = resolved(config, device)
    dataset = ShardDataset.open(config.data)
    torch.manual_seed(config.seed)  # equal weights on every rank
    method = method_of(config.method)(
        config.encoder, config.method, batch_size=config.batch_size, seed=config.seed
    )
    views = MaskedViews(
        config.data,
        recipe=config.recipe,
        batch_size=config.batch_size // world_size(),
        device=device.type,
        rank=rank(),
        world_size=world_size(),
        seed=config.seed,
        cache=Cache(Path(config.cache), int(1e9 * config.cache_gb)) if config.cache else None,
    )
    method = method.to(device).to(memory_format=torch.channels_last).train()
    return Job(config=config, device=device, dataset=dataset, method=method, views=views)


def run_steps(
    job: Job,
    optimizer: torch.optim.Optimizer,
    checkpoints: Checkpoints,
    record: Record | None,
    step: int,
    interrupt: Interrupt,
) -> None:
    """Train from `step` finished steps to the end; `record` on rank 0.

    Raises:
        TerminatedError: some rank was asked to stop; the state is saved.
    """
    config, epoch_steps = job.config, job.epoch_steps
    model = parallel(job.method)
    meter = Meter(config.batch_size)
    for batch, waited in batches(job.views, job.total_steps - step):
        lr = learning_rate(
            step,
            peak=config.peak_lr,
            total=job.total_steps,
            warmup=config.warmup_epochs * epoch_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(config.precision, job.device):
            scalars = model(batch)
        optimizer.zero_grad(set_to_none=True)
        scalars["loss"].backward()
        optimizer.step()
        step += 1
        meter.add(scalars, waited, step=step, epoch=math.ceil(step / epoch_steps), lr=lr)

        stops = interrupt.anywhere()
        saves = step % (config.checkpoint_steps or epoch_steps) == 0 or step % epoch_steps == 0
        saves = saves or stops
        if saves or step % config.log_steps == 0:
            rows, seconds = meter.take()
            stop_if_not_finite(rows)
            if record is not None:
                record.steps(rows, seconds)
        if saves:
            if record is not None:
                record.sync()
            checkpoints.save(step, job.method, optimizer, job.views)
            meter.restart()
        if stops and step < job.total_steps:
            leave(step)


def leave(step: int) -> None:
    """End every rank; rank 0 speaks."""
    if is_main():
        raise TerminatedError(
            f"stopped and saved after step {step}; the same command goes on from there",
            STATUS,
        )
    raise SystemExit(STATUS)


def parallel(method: Method) -> nn.Module:
    """The method under DDP where there are several ranks: gradients are means over them.

    Buffers are not broadcast: the queue is equal on all ranks anyhow (at 65,536 x 128 it would be
    33 MB a step), and each rank's batch normalisation keeps its own running statistics; rank 0's
    are the ones saved.
    """
    if world_size() == 1:
        return method
    # torch 2.15 renamed the option; the range of versions that we run on has both names
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **options)


def batches(views: MaskedViews, steps: int) -> Iterator[tuple[Any, float]]:
    """`steps` batches, epoch after epoch, each with the seconds that were spent waiting for it."""
    endless = chain.from_iterable(repeat(views))
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(endless)
        yield batch, time.perf_counter() - start


def stop_if_not_finite(rows: list[dict[str, Any]]) -> None:
    """Stop all ranks at the first step whose loss is not a number; nothing of it is saved."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            fail(
                f"the loss of step {row['step']} is {row['loss']}: try a lower --lr, a warm-up or "
                "--precision fp32; the last checkpoint is of an earlier step"
            )
