"""The training loop: the same lines for one process and for many."""

import errno
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from schemas import UserError
from schemas.cli import TerminatedError
from train.checkpoint import Checkpoints
from train.config import TrainConfig, default_settings, settings_of
from train.run_info import introduction, metadata_of, write_start
from train.distributed import gather_objects, is_main, together, world_size
from train.encoders import save_encoder
from train.knn import KnnDuringTraining
from train.nan_guard import LossWatch
from train.data import Feed
from train.config_io import dump
from train.preemption import STATUS, Interrupt
from train.trainer import Job, prepare
from train.metrics_logger import Meter
from train.methods import Method
from train.optim import learning_rate
from train.metrics_logger import Record, disk_has_room
from train.training_step import Step

LOCK_SECONDS = 30
"""How long a run waits for one that is just ending in the same folder."""

Evaluation = Callable[[Method, int], dict[str, float]]
"""Called on all ranks after each epoch, counted from 1: scores for the log by name, if any are due.
It must leave the method and all random generators as they were."""


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
        TerminatedError: SIGTERM, SIGUSR1 or SIGINT came, and the state is saved. Likewise.
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


def locked_train(job: Job, evaluation: Evaluation | None) -> Path:
    """`train_job` once the folder is ours: restore, run, export."""
    config, out = job.config, job.out
    settings = settings_of(config, job.data_digest) | {"steps_per_epoch": job.epoch_steps}
    checkpoints = Checkpoints(
        folder=out / "checkpoints",
        keep=config.keep_checkpoints,
        settings=settings,
        defaults=default_settings(type(config.method), job.given, config),
    )
    step = Step(job.method, config, job.device)
    with together():
        if config.resume == "never" and checkpoints.steps():
            raise UserError(f"{out}: holds the checkpoints of a run; choose another --out")
        done, saved_by = checkpoints.restore(job.method, step, job.views)
    record = None
    with together():
        if is_main():
            checkpoints.remove_unfinished()
            (out / "config.yaml").write_text(dump(job.given, config))
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
                processes = f", {saved_by} -> {world_size()} processes" * (saved_by != world_size())
                record.say(f"resumes after step {done} of {job.total_steps}{processes}")

    loop = Loop(job, step, checkpoints, record, evaluation)
    with loop.interrupt.listening():
        if done and done % job.epoch_steps == 0:
            loop.catch_up(done)
        loop.run(done + 1, job.total_steps)

    path = out / job.method.file
    with together():
        if record is not None:
            save_encoder(
                path, job.method.exported(), metadata_of(config, job.data_name, job.data_digest)
            )
            record.say(f"written: {path}")
            record.close()
    return path


class Loop:
    """The steps of a job, and what goes on around them; `record` is there on rank 0."""

    def __init__(
        self,
        job: Job,
        step: Step,
        checkpoints: Checkpoints,
        record: Record | None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.job, self.step, self.checkpoints = job, step, checkpoints
        self.record, self.evaluation = record, evaluation
        self.interrupt = Interrupt()
        self.feed = Feed(job.views, memory=job.config.log_steps)
        self.meter = Meter(job.config.batch_size)
        self.watch = LossWatch(step, self.feed, job.out)

    def run(self, first: int, last: int) -> None:
        """Make the steps `first` to `last`, counted from 1.

        Raises:
            TerminatedError: some rank was asked to stop; the state is saved.
        """
        config, epoch_steps = self.job.config, self.job.epoch_steps
        peak = config.optim.peak(config.batch_size)
        for number in range(first, last + 1):
            epoch = math.ceil(number / epoch_steps)
            lr = learning_rate(
                config.optim, number - 1, peak=peak, total=self.job.total_steps, epoch=epoch_steps
            )
            stops = self.interrupt.anywhere()
            ends = number % epoch_steps == 0
            saves = stops or ends or number % (config.checkpoint_steps or epoch_steps) == 0
            logs = saves or number % config.log_steps == 0
            check = partial(self.watch.check, number) if logs else None
            scalars = self.step(self.feed.parts(config.accumulate), lr, check)
            if check is None:
                self.watch.note(scalars)
            self.meter.add(scalars, self.feed.waited, step=number, epoch=epoch, lr=lr)
            if (number - 1) % epoch_steps == 0:
                self.show(number, epoch)
            if logs:
                self.log()
            if saves:
                self.checkpoints.save(number, self.job.method, self.step, self.job.views)
                self.meter.restart()
            if stops and number < self.job.total_steps:
                leave(number)
            if ends:
                self.evaluate(number, epoch)

    def show(self, number: int, epoch: int) -> None:
        """The views that an epoch begins with."""
        if self.record is not None and self.feed.last is not None:
            sheet = self.job.method.sheet(self.feed.last, self.job.config.recipe)
            with disk_has_room(self.job.out):
                self.record.views(sheet, number, epoch)

    def log(self) -> None:
        """Tell of the steps since the last time; on the disk before a checkpoint of them is."""
        rows, seconds = self.meter.take()
        if self.record is not None:
            with disk_has_room(self.job.out):
                self.record.steps(rows, seconds)
                self.record.sync()

    def evaluate(self, number: int, epoch: int) -> None:
        """Score the epoch that step `number` ended; its checkpoint is there already."""
        if self.evaluation is None:
            return
        scores = self.evaluation(self.job.method, epoch)
        if scores and self.record is not None:
            with disk_has_room(self.job.out):
                self.record.scores(scores, number, epoch)
                self.record.sync()
        self.meter.restart()

    def catch_up(self, done: int) -> None:
        """Evaluate the last epoch of a run that was stopped between its checkpoint and that."""
        missing = self.record is not None and not self.record.has_scores(done)
        if gather_objects(missing)[0]:
            self.evaluate(done, done // self.job.epoch_steps)


def leave(step: int) -> None:
    """End every rank; rank 0 speaks."""
    if is_main():
        raise TerminatedError(
            f"stopped and saved after step {step}; the same command goes on from there",
            STATUS,
        )
    raise SystemExit(STATUS)
