"""The trainer: build what one rank trains with, run its steps, save, log and evaluate."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from pipeline import MaskedViews
from schemas import ShardDataset, UserError
from schemas.counts import format_count
from schemas.folder_lock import LOCK, lock_folder
from schemas.storage import Store, write_atomically
from train.checkpoint import Checkpoints, Restored, wait_until_visible
from train.config import (
    TrainConfig,
    collect_default_settings,
    collect_settings,
    make_cache,
    refuse_different_options,
    resolve_config,
)
from train.config_io import dump_config
from train.data import SYNTHETIC_CLASSES, BatchStream, SyntheticViews, Views
from train.distributed import gather_objects, is_main, raise_on_all_ranks, rank, world_size
from train.encoders import save_encoder, zero_residual_gammas_
from train.knn import OnlineKnn
from train.methods import Method, Setup, digest_method
from train.metrics_logger import MetricsBuffer, MetricsLogger, translate_write_errors
from train.nan_guard import NanGuard
from train.optim import compute_learning_rate
from train.preemption import PreemptionListener, exit_preempted
from train.process_group import pick_device
from train.run_info import append_start, build_metadata, describe_run
from train.training_step import TrainingStep, prepare_model_

LOCK_SECONDS = 30
"""Seconds to wait for another run that is just ending in the same folder."""

Evaluation = Callable[[Method, int], dict[str, float]]
"""Called on all ranks after each epoch, counted from 1; returns scores for the log by name, if any
are due. It must leave the method and all random generators unchanged."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that one rank trains with."""

    user_config: TrainConfig
    """Options as the user gave them."""
    config: TrainConfig
    """Options without any `auto` or `None` that affects results."""
    device: torch.device
    data_name: str
    data_digest: str
    """Digest of the training data."""
    method: Method
    views: Views
    code: dict[str, str] = field(default_factory=dict)
    """Digest of the method's file as it was loaded, see `digest_method`."""
    batch_may_change: bool = False
    """True if the run may resume with another global batch where an epoch ended."""

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def epoch_steps(self) -> int:
        return len(self.views)

    @property
    def total_steps(self) -> int:
        return self.epoch_steps * self.config.epochs


def prepare_job(user_config: TrainConfig) -> TrainingJob:
    """Decide open options, build the method, open the loader.

    Raises:
        UserError: unsuitable data or options.
    """
    device = pick_device(user_config.device)
    config = resolve_config(user_config, device)
    dataset = None if config.synthetic else ShardDataset.open(config.data)
    torch.manual_seed(config.seed)  # equal weights on every rank
    torch.backends.cudnn.benchmark = True  # all views have the same size
    setup = Setup(
        encoder=config.encoder,
        stem=config.stem,
        sync_bn=config.sync_bn,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        crop_size=config.recipe.crop_size,
        classes=SYNTHETIC_CLASSES if dataset is None else len(dataset.classes),
        count_unlabeled=lambda: 0 if dataset is None else dataset.unlabeled,
        seed=config.seed,
    )
    method = config.method.build(setup)
    if config.zero_init_residual:
        zero_residual_gammas_(method, config.encoder)
    method = prepare_model_(method, config, device)
    return TrainingJob(
        user_config=user_config,
        config=config,
        device=device,
        data_name="synthetic" if dataset is None else dataset.card.name,
        data_digest="synthetic" if dataset is None else dataset.digest,
        method=method,
        views=open_views(config, device),
        code=digest_method(config.method),
    )


def open_views(config: TrainConfig, device: torch.device) -> Views:
    """Open the loader of this rank."""
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
        cache=make_cache(config.cache, config.cache_gb),
        shuffle_shards=config.shuffle_shards,
        streams=config.streams,
        decode_on=config.decode_on,
    )


def train(config: TrainConfig, evaluation: Evaluation | None = None) -> Path:
    """Pretrain with `config`, or resume an earlier run in its folder; called on all ranks.

    Args:
        config: the options.
        evaluation: evaluates each epoch; by default kNN accuracy, if `config.knn` names data.

    Returns:
        The file of the trained encoder.

    Raises:
        UserError: unsuitable data or options, an earlier run with other settings, a loss or
            gradient that is not finite, or a full disk. On rank 0; the others exit with status 2.
        TerminatedError: SIGTERM, SIGUSR1 or SIGINT came, and the state is saved. On rank 0.
    """
    with raise_on_all_ranks():
        job = replace(prepare_job(config), batch_may_change=True)
        if evaluation is None and job.config.knn.data is not None:
            evaluation = OnlineKnn(job.config, job.device)
    return train_job(job, evaluation)


def train_job(job: TrainingJob, evaluation: Evaluation | None = None) -> Path:
    """Run `train` for a prepared job."""
    with raise_on_all_ranks():
        refuse_different_options(job.config, job.data_digest, job.device)
    lock = None
    with raise_on_all_ranks():
        if is_main():
            lock = lock_run(job.out)
    try:
        with raise_on_all_ranks():
            wait_until_visible(job.out / LOCK)
        return train_in_locked_folder(job, evaluation)
    finally:
        if lock is not None:
            lock.release()


def lock_run(out: Path) -> FileLock:
    """Keep other runs out of this folder until this process ends, however it ends.

    Raises:
        UserError: another run holds the lock, the file system does not support locks, or the name
            of the folder is not UTF-8.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{out}: TensorBoard needs a name in UTF-8; choose another --out"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(
        out,
        LOCK_SECONDS,
        f"{out}: another run is writing here; wait for it, or choose another --out",
    )
    if lock is None:
        raise UserError(
            f"{out}: the file system does not support locks, as NFS without its lock service; "
            "mount it with locks, or choose another --out"
        )
    return lock


def train_in_locked_folder(job: TrainingJob, evaluation: Evaluation | None) -> Path:
    """Restore, run and export, as the only run in the folder."""
    config, out = job.config, job.out
    settings = collect_settings(config, job.data_digest) | job.code
    settings["steps_per_epoch"] = job.epoch_steps
    # an older checkpoint does not have the digest of a file
    defaults = collect_default_settings(type(config.method), job.user_config, config) | job.code
    checkpoints = Checkpoints(
        folder=out / "checkpoints",
        keep=config.keep_checkpoints,
        settings=settings,
        defaults=defaults,
        batch_may_change=job.batch_may_change,
        changeable=frozenset()
        if config.method.depends_on_micro_batches
        else frozenset({"grad_accum_steps"}),
    )
    step = TrainingStep(job.method, config, job.device)
    last = checkpoints.agree_on_last()
    with raise_on_all_ranks():
        if config.resume == "never" and last is not None:
            raise UserError(f"{out}: holds the checkpoints of a run; choose another --out")
        restored = checkpoints.restore(last, job.method, step, job.views)
        done = restored.step
    logger = None
    with raise_on_all_ranks():
        if is_main():
            checkpoints.remove_unfinished()
            checkpoints.rename_last(done)
            Store(out).remove_temporaries("")  # of an encoder that a killed process was writing
            write_atomically(
                out / "config.yaml", dump_config(job.user_config, config).encode()
            )  # a run may be resumed from this file alone
            append_start(out / "starts.jsonl", config, job.device, done, job.data_digest)
            logger = MetricsLogger(
                out,
                start=done,
                total=job.total_steps,
                epoch_steps=job.epoch_steps,
                epoch_name=config.method.epoch_name,
                wandb_project=config.wandb,
                config=settings,
            )
    try:
        return run_and_export(Trainer(job, step, checkpoints, logger, evaluation), restored)
    except BaseException:
        if logger is not None:
            logger.abandon()
        raise


def run_and_export(trainer: "Trainer", restored: Restored) -> Path:
    """Run the steps that are left, and write the encoder."""
    job, logger, done = trainer.job, trainer.logger, restored.step
    with raise_on_all_ranks():
        if logger is not None:
            for line in describe_run(job.config, job.method, job.views, job.device):
                logger.print(line)
            if done:
                logger.print(describe_resumption(job, restored))
    with trainer.preemption.listen():
        if done and done % job.epoch_steps == 0:
            trainer.catch_up(done)
        trainer.run(done + 1, job.total_steps)

    path = job.out / job.method.file
    with raise_on_all_ranks():
        if logger is not None:
            metadata = build_metadata(job.config, job.data_name, job.data_digest)
            save_encoder(path, job.method.exported(), metadata)
            logger.print(f"written: {path}")
            logger.close()
    return path


def describe_resumption(job: TrainingJob, restored: Restored) -> str:
    """Return a line that says where the run resumes, and what is different from before."""
    parts = [f"resumes after step {restored.step} of {job.total_steps}"]
    if restored.world_size != world_size():
        parts.append(
            f"{restored.world_size} -> {format_count(world_size(), 'process', 'processes')}"
        )
    if restored.batch_size != job.config.batch_size:
        parts.append(f"batch {restored.batch_size} -> {job.config.batch_size}")
    return ", ".join(parts)


class Trainer:
    """Runs the steps of a job with logging, checkpoints, evaluation and preemption checks.

    `logger` is None on all ranks but rank 0.
    """

    def __init__(
        self,
        job: TrainingJob,
        step: TrainingStep,
        checkpoints: Checkpoints,
        logger: MetricsLogger | None,
        evaluation: Evaluation | None = None,
    ) -> None:
        self.job, self.step, self.checkpoints = job, step, checkpoints
        self.logger, self.evaluation = logger, evaluation
        self.preemption = PreemptionListener()
        self.stream = BatchStream(job.views, memory=job.config.log_steps)
        self.metrics = MetricsBuffer(job.config.batch_size)
        self.nan_guard = NanGuard(step, self.stream, job.out)

    def run(self, first: int, last: int) -> None:
        """Make the steps `first` to `last`, counted from 1.

        Raises:
            TerminatedError: a rank was asked to stop; the state is saved.
        """
        config, epoch_steps = self.job.config, self.job.epoch_steps
        peak = config.optim.peak(config.batch_size)
        for number in range(first, last + 1):
            epoch = math.ceil(number / epoch_steps)
            lr = compute_learning_rate(
                config.optim, number - 1, peak=peak, total=self.job.total_steps, epoch=epoch_steps
            )
            stops = self.preemption.poll_all_ranks()
            ends_epoch = number % epoch_steps == 0
            saves = stops or ends_epoch or number % (config.checkpoint_steps or epoch_steps) == 0
            logs = saves or number % config.log_steps == 0
            seed_global_generators(config.seed, number, rank())
            check = partial(self.nan_guard.check, number, logs)
            scalars = self.step(self.stream.next_micro_batches(config.grad_accum_steps), lr, check)
            self.metrics.add(scalars, self.stream.waited, step=number, epoch=epoch, lr=lr)
            if (number - 1) % epoch_steps == 0:
                self.log_views(epoch)
            if logs:
                self.log(warns=ends_epoch)
            if saves:
                self.checkpoints.save(number, self.job.method, self.step, self.job.views)
                self.metrics.restart_clock()
            if stops and number < self.job.total_steps:
                exit_preempted(number)
            if ends_epoch:
                self.evaluate(number, epoch)

    def log_views(self, epoch: int) -> None:
        """Save an image of the first views of an epoch."""
        if self.logger is not None and self.stream.last is not None:
            sheet = self.job.method.sheet(self.stream.last, self.job.config.recipe)
            with translate_write_errors(self.job.out):
                self.logger.log_views(sheet, epoch)

    def log(self, warns: bool) -> None:
        """Log the steps since the last call, and flush them before a checkpoint is written.

        If `warns`, also print the method's warnings about the last one.
        """
        rows, seconds = self.metrics.take()
        if self.logger is not None:
            with translate_write_errors(self.job.out):
                self.logger.log_steps(rows, seconds)
                self.logger.sync()
            if warns:
                self.logger.print_warnings(self.job.method.warnings(rows[-1]), rows[-1]["step"])

    def evaluate(self, number: int, epoch: int) -> None:
        """Evaluate the epoch that step `number` ended; its checkpoint is already written."""
        if self.evaluation is None:
            return
        scores = self.evaluation(self.job.method, epoch)
        if scores and self.logger is not None:
            with translate_write_errors(self.job.out):
                self.logger.log_scores(scores, number, epoch)
                self.logger.sync()
        self.metrics.restart_clock()

    def catch_up(self, done: int) -> None:
        """Evaluate the last epoch of a run that was stopped after its checkpoint was written."""
        epoch = done // self.job.epoch_steps
        missing = self.logger is not None and not self.logger.has_scores(epoch)
        if gather_objects(missing)[0]:
            self.evaluate(done, epoch)


def seed_global_generators(seed: int, step: int, number: int) -> None:
    """Seed torch's global generators for one step of rank `number`.

    Initial weights come from these generators in the same state on all ranks, but what networks
    draw in a step, such as the size of an image in detection, must differ between ranks.
    """
    torch.manual_seed(random.Random(f"{seed} {step} {number}").getrandbits(63))
