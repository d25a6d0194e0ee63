"""The command `linear`: train a linear classifier on a frozen encoder, by MoCo's protocol.

The encoder and its batch statistics are frozen; SGD with lr 30 for a batch of 256, momentum 0.9, no
weight decay, 100 epochs, divided by 10 at epochs 60 and 80; random resized crops of 8 % to 100 %
and flips (main_lincls.py of MoCo and of the masked variant's released code). An encoder with a
high-pass recipe is trained and tested on high-pass images, as in that code (D15 in docs/method.md).
On other data than that of pretraining this is the transfer evaluation; the paper's own protocol for
it is not published.

It uses the trainer of `train`, so it runs under torchrun and resumes by the same command.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
import tyro

from pipeline import Cache, Recipe
from schemas.counts import format_count
from schemas.json_lines import read_json_lines
from schemas.precision import Precision, autocast
from schemas.settings import flatten
from train.config import TrainConfig, make_cache
from train.distributed import is_main, raise_on_all_ranks, world_size
from train.encoders import compute_digest, load_encoder
from train.evaluate import results
from train.features import (
    build_eval_recipe,
    open_eval_views,
    open_labeled_pair,
    pick_eval_precision,
)
from train.methods import LinearProbe, LinearProbeConfig, Method
from train.optim import OptimConfig
from train.option_ranges import check_ranges
from train.presets import SUPERVISED_VIEWS
from train.process_group import pick_device
from train.trainer import TrainingJob, prepare_job, train_job

MILESTONES = (0.6, 0.8)
"""Learning rate milestones as shares of the epochs: 60 and 80 of MoCo's 100."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Train a linear classifier on a frozen encoder, and test it after each epoch."""

    encoder: str = tyro.MISSING
    """Folder of a run, or a file of weights: encoder.safetensors or a foreign checkpoint."""
    data: str = tyro.MISSING
    """Labeled shards to train on."""
    test_data: str = tyro.MISSING
    """Labeled shards to test on."""
    out: str | None = None
    """Folder of the probe's own run; by default linear-DATA-SEED in the encoder's folder."""
    batch_size: int = 256
    """Global batch: images per step over all processes."""
    epochs: int = 100
    """Number of passes over the training images."""
    base_lr: float = 30.0
    """Peak learning rate for a batch of 256 images; scaled linearly to other batches."""
    milestones: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=("--drop-epochs",))] = None
    """Epochs, counted from 0, at which the learning rate is divided by 10; by default after 60 %
    and 80 % of all epochs."""
    seed: int = 0
    """Random seed for the classifier's weights, sample order and crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU, else cpu."""
    rank_timeout: int = 600
    """Seconds after which a process that does not answer counts as dead and the job ends."""
    log_steps: int = 10
    """Steps between two log lines."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of encoder and classifier. auto: fp32 for an encoder that was trained in fp32;
    otherwise bf16 if the device supports it."""
    cache: str | None = None
    """Folder on a local disk that keeps downloaded shards; by default ~/.cache/saliency-shards for
    a remote dataset and none for a local one."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; by default half of the free disk,
    counting its own files as free."""


def evaluate(options: LinearOptions) -> dict[str, Any]:
    """Train, test, append a row to results.jsonl beside the encoder, return it; on all ranks.

    The accuracies of the row are `top1` and `top5` after the last epoch and `best_top1` over all
    epochs, with the number of that epoch. Which of the two published tables report is not known.

    Raises:
        UserError: unsuitable encoder, data or options.
    """
    with raise_on_all_ranks():
        check_ranges(flatten(options))
        device = pick_device(options.device)
        _, metadata, path = load_encoder(options.encoder, notes_images=True)
        if is_main():
            results.check_writable(path.parent)
        train_set, test_set = open_labeled_pair(options.data, options.test_data)
        assert test_set is not None
    recipe = build_eval_recipe(metadata)
    cache = make_cache(options.cache, options.cache_gb)
    out = Path(options.out or path.parent / f"linear-{train_set.title}-{options.seed}")
    precision = pick_eval_precision(options.precision, metadata, device)
    config = build_train_config(options, metadata["encoder"], path, recipe, out, precision)

    def test_after_epoch(method: Method, epoch: int) -> dict[str, float]:
        probe = cast(LinearProbe, method)
        share = max(1, options.batch_size // world_size())
        return test(probe, recipe, options.test_data, device, share, precision, cache)

    with raise_on_all_ranks():
        job = add_test_digest(prepare_job(config), test_set.digest)
    train_job(job, test_after_epoch)
    with raise_on_all_ranks():
        epochs = [row for row in read_json_lines(out / "metrics.jsonl") if "top1" in row]
        best = max(epochs, key=lambda row: row["top1"])
        last = epochs[-1]
        row = results.build_row(
            "linear",
            metadata,
            train_set,
            test_set,
            {"top1": last["top1"], "top5": last["top5"], "best_top1": best["top1"]},
            best_epoch=best["epoch"],
            epochs=options.epochs,
            batch_size=options.batch_size,
            base_lr=options.base_lr,
            drop_epochs=list(config.optim.milestones),  # the name in older results.jsonl too
            seed=options.seed,
            precision=precision,
        )
        if is_main():
            results.append(path.parent, [row])
    return row


def add_test_digest(job: TrainingJob, digest: str) -> TrainingJob:
    """Make the test images a setting of the job, so that no run resumes with other ones.

    The option stays open in `job.user_config`, so a checkpoint of an older version, without it,
    resumes.
    """
    method = replace(cast(LinearProbeConfig, job.config.method), test_digest=digest)
    return replace(job, config=replace(job.config, method=method))


def build_train_config(
    options: LinearOptions,
    encoder: str,
    path: Path,
    recipe: Recipe,
    out: Path,
    precision: Precision,
) -> TrainConfig:
    """Build the options of `train` for a probe of the encoder in the file at `path`."""
    milestones = options.milestones
    if milestones is None:
        epochs = {round(share * options.epochs) for share in MILESTONES}
        milestones = tuple(sorted(epoch for epoch in epochs if epoch < options.epochs))
    return TrainConfig(
        data=options.data,
        out=str(out),
        method=LinearProbeConfig(path=str(path), sha256=compute_digest(path)),
        recipe=replace(recipe, **SUPERVISED_VIEWS),
        encoder=encoder,
        batch_size=options.batch_size,
        epochs=options.epochs,
        optim=OptimConfig(
            base_lr=options.base_lr,
            weight_decay=0.0,
            schedule="steps",
            milestones=milestones,
        ),
        seed=options.seed,
        device=options.device,
        precision=precision,
        rank_timeout=options.rank_timeout,
        log_steps=options.log_steps,
        keep_checkpoints=1,
        cache=options.cache,
        cache_gb=options.cache_gb,
    )


@torch.no_grad()
def test(
    probe: LinearProbe,
    recipe: Recipe,
    url: str,
    device: torch.device,
    batch_size: int,
    precision: Precision,
    cache: Cache | None,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy on center crops; over all ranks each image counts once."""
    views = open_eval_views(url, recipe, device, batch_size, cache)
    counts = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-5, images
    for batch in views:
        with autocast(precision, device):
            logits = probe.logits(batch.image)
        nearest = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.label[:, None]
        counts[:2] += torch.stack([nearest[:, 0].sum(), nearest.sum()])
        counts[2] += len(nearest)
    if world_size() > 1:
        dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return {"top1": top1 / images, "top5": top5 / images}


def format_result(row: dict[str, Any]) -> str:
    """Format the row as one line for the terminal."""
    accuracy = row["accuracy"]
    return (
        f"linear probe of {row['encoder']} on {row['data']}, "
        f"{format_count(row['test_images'], 'image')}: "
        f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%} after "
        f"{format_count(row['epochs'], 'epoch')} "
        f"(best top-1 {accuracy['best_top1']:.2%}, epoch {row['best_epoch']})"
    )
