"""The training loop: the same lines for one process and for many."""

import errno
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from pipeline import Cache, MaskedViews
from schemas import ShardDataset, UserError
from schemas.cli import TerminatedError
from train.checkpoint import Checkpoints
from train.config import TrainConfig, resolved, settings_of
from train.describe import introduction, metadata_of, write_start
from train.distributed import is_main, pick_device, rank, together, world_size
from train.encoders import save_encoder
from train.evaluate.during import KnnDuringTraining
from train.failure import LossWatch
from train.feed import SYNTHETIC_CLASSES, Feed, SyntheticViews, Views
from train.files import dump
from train.interrupt import STATUS, Interrupt
from train.meter import Meter
from train.methods import Method, Setup
from train.optim import learning_rate
from train.record import Record
from train.step import Step, placed

LOCK_SECONDS = 30
"""How long a run waits for one that is just ending in the same folder."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank trains with."""

    config: TrainConfig  # with everything decided
    device: torch.device
    data_name: str
    data_digest: str  # of what it trains on
    method: Method
    views: Views

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def epoch_steps(self) -> int:
        return len(self.views)

    @property
    def total_steps(self) -> int:
        return self.epoch_steps * self.config.epochs


Evaluation = Callable[[Method, int], dict[str, float]]
"""Called on all ranks after each epoch, counted from 1: scores for the log, by name."""


def train(config: TrainConfig, evaluation: Evaluation | None = None) -> Path:
    """Pretrain as `config` says, or go on where an earlier run in its folder was; on all ranks.

    Args:
        config: the options.
        evaluation: of each epoch; by default the kNN accuracy, if `config.knn` names data.

    Returns:
        The file of the trained encoder.

    Raises:
        UserError: data, options or an earlier run that do not fit; a loss that is not finite; no
            room to save. On rank 0; the other ranks exit with status 2.
        TerminatedError: SIGTERM or SIGUSR1 came, and the state is saved. Likewise.
    """
    with together():
        job = prepare(config)
        if evaluation is None and job.config.knn.data is not None:
            evaluation = KnnDuringTraining(job.config, job.device)
    return train_job(job, evaluation)


def train_job(job: Job, evaluation: Evaluation | None = None) -> Path:
    """`train` for a job that is ready."""
    lock = None
    with together():
        if is_main():
            lock = locked(job.out)
    try:
        return locked_train(job, evaluation)
    finally:
        if lock is not None:
            lock.release()


def locked_train(job: Job, evaluation: Evaluation | None) -> Path:
    """`train_job` once the folder is ours: restore, run, export."""
    config, out = job.config, job.out
    settings = settings_of(config, job.data_digest) | {"steps_per_epoch": job.epoch_steps}
    checkpoints = Checkpoints(
        folder=out / "checkpoints", keep=config.keep_checkpoints, settings=settings
    )
    step = Step(job.method, config, job.device)
    with together():
        if config.resume == "never" and checkpoints.steps():
            raise UserError(f"{out}: holds the checkpoints of a run; choose another --out")
        done = checkpoints.restore(job.method, step, job.views)
    record = None
    with together():
        if is_main():
            (out / "config.yaml").write_text(dump(config))
            write_start(out / "starts.jsonl", config, job.device, done, job.data_digest)
            record = Record(
                out,
                start=done,
                total=job.total_steps,
                epoch_steps=job.epoch_steps,
                wandb_project=config.wandb,
                config=settings,
            )
            for line in introduction(config, job.method, job.views, job.device):
                record.say(line)
            if done:
                record.say(f"goes on after step {done} of {job.total_steps}")

    interrupt = Interrupt()
    with interrupt.listening():
        run_steps(job, step, checkpoints, record, done, interrupt, evaluation)

    path = out / job.method.file
    with together():
        if record is not None:
            save_encoder(
                path, job.method.exported(), metadata_of(config, job.data_name, job.data_digest)
            )
            record.say(f"written: {path}")
            record.close()
    return path


def prepare(config: TrainConfig) -> Job:
    """Decide what was left open, build the method, open the loader."""
    device = pick_device(config.device)
    config = resolved(config, device)
    dataset = None if config.synthetic else ShardDataset.open(config.data)
    torch.manual_seed(config.seed)  # equal weights on every rank
    setup = Setup(
        encoder=config.encoder,
        stem=config.stem,
        sync_bn=config.sync_bn,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        crop_size=config.recipe.crop_size,
        classes=SYNTHETIC_CLASSES if dataset is None else len(dataset.classes),
        seed=config.seed,
    )
    method = placed(config.method.build(setup), config, device)
    views = open_views(config, device)
    return Job(
        config=config,
        device=device,
        data_name="synthetic" if dataset is None else dataset.card.name,
        data_digest="synthetic" if dataset is None else dataset.digest,
        method=method,
        views=views,
    )


def open_views(config: TrainConfig, device: torch.device) -> Views:
    """The loader of this rank."""
    share = config.batch_size // world_size()
    if config.synthetic:
        return SyntheticViews(
            config.synthetic, config.recipe, share, device, world_size(), config.seed
        )
    return MaskedViews(
        config.data,
        recipe=config.recipe,
        batch_size=share,
        device=device.type,
        rank=rank(),
        world_size=world_size(),
        seed=config.seed,
        report=("keys",),
        cache=Cache(Path(config.cache), int(1e9 * config.cache_gb)) if config.cache else None,
    )


def locked(out: Path) -> FileLock:
    """Keep other runs out of this folder until this process ends, however it ends.

    Raises:
        UserError: another run is in it, or its file system has no locks.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        raise UserError(
            f"{out}: another training is writing here; wait for it, or choose another --out"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        raise UserError(
            f"{out}: its file system gives no locks, as NFS does without its lock service; mount "
            "it with locks, or choose another --out"
        ) from error
    return lock


def run_steps(
    job: Job,
    step: Step,
    checkpoints: Checkpoints,
    record: Record | None,
    done: int,
    interrupt: Interrupt,
    evaluation: Evaluation | None,
) -> None:
    """Train from `done` finished steps to the end; `record` on rank 0.

    Raises:
        TerminatedError: some rank was asked to stop; the state is saved.
    """
    config, epoch_steps = job.config, job.epoch_steps
    feed, meter = Feed(job.views, memory=config.log_steps), Meter(config.batch_size)
    watch = LossWatch(step, feed, job.out)
    for number in range(done + 1, job.total_steps + 1):
        lr = learning_rate(
            config.optim,
            number - 1,
            peak=config.optim.peak(config.batch_size),
            total=job.total_steps,
            epoch=epoch_steps,
        )
        epoch = math.ceil(number / epoch_steps)
        stops = interrupt.anywhere()
        ends = number % epoch_steps == 0
        saves = stops or ends or number % (config.checkpoint_steps or epoch_steps) == 0
        logs = saves or number % config.log_steps == 0
        check = partial(watch.check, number) if logs else None
        scalars = step(feed.parts(config.accumulate), lr, check)
        if check is None:
            watch.note(scalars)
        meter.add(scalars, feed.waited, step=number, epoch=epoch, lr=lr)
        if record is not None and (number - 1) % epoch_steps == 0 and feed.last is not None:
            record.views(job.method.sheet(feed.last, config.recipe), number, epoch)
        if logs:
            rows, seconds = meter.take()
            if ends and evaluation is not None:
                rows[-1] |= evaluation(job.method, epoch)
            if record is not None:
                record.steps(rows, seconds)
                record.sync()
        if saves:
            checkpoints.save(number, job.method, step, job.views)
            meter.restart()
        if stops and number < job.total_steps:
            leave(number)


def leave(step: int) -> None:
    """End every rank; rank 0 speaks."""
    if is_main():
        raise TerminatedError(
            f"stopped and saved after step {step}; the same command goes on from there",
            STATUS,
        )
    raise SystemExit(STATUS)
