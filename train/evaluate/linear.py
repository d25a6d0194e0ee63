"""The command `linear`: a linear classifier on a frozen encoder, by MoCo's protocol.

Encoder frozen, its batch statistics too; SGD, lr 30 at a batch of 256, momentum 0.9, no weight
decay, 100 epochs, a tenth from epochs 60 and 80 on; random resized crops of 8 % to 100 % and flips
(main_lincls.py of MoCo and of the masked variant's released code). An encoder of a high-pass recipe
is trained and tested on high-pass images, as that code does (docs/method.md, D15). On other data
than the pretraining's this is the transfer evaluation; the paper's own protocol is not published.

It is trained by the loop of `train`: under torchrun too, and resumed by the same command.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import tyro

from pipeline import Cache, Recipe
from train.config import TrainConfig, autocast, cache_of, pick_precision
from train.distributed import is_main, together, world_size
from train.encoders import digest, load_encoder
from train.evaluate import results
from train.evaluate.features import labelled_pair, plain_views, recipe_of
from train.loop import train
from train.methods import LinearProbe, LinearProbeConfig, Method
from train.optim import OptimConfig
from train.presets import SUPERVISED_VIEWS
from train.session import pick_device

DROPS = (0.6, 0.8)
"""Shares of the epochs after which the rate drops: 60 and 80 of MoCo's 100."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Train a linear classifier on a frozen encoder, and test it after each epoch."""

    encoder: str = tyro.MISSING
    """A run's folder, or a file of weights: encoder.safetensors or a checkpoint from elsewhere."""
    data: str = tyro.MISSING
    """Labelled shards to train on."""
    test_data: str = tyro.MISSING
    """Labelled shards to test on."""
    out: str | None = None
    """The probe's own folder; linear-DATA in the encoder's when not given."""
    batch_size: int = 256
    """Images a step, of all processes together."""
    epochs: int = 100
    """Times the training images are seen."""
    base_lr: float = 30.0
    """Highest learning rate at a batch of 256 images; in proportion at others."""
    drop_epochs: tuple[int, ...] | None = None
    """Epochs, counted from 0, at which the rate drops to a tenth; after 60 % and 80 % of all when
    not given."""
    seed: int = 0
    """Of the classifier's weights, order and crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""
    log_steps: int = 10
    """Steps between two log lines."""
    cache: str | None = None
    """Folder on a local disk that keeps shards fetched from elsewhere; ~/.cache/saliency-shards for
    a remote dataset when not given. A local dataset is copied to it only if it is given."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; half of the free disk when not given."""


def evaluate(options: LinearOptions) -> dict[str, Any]:
    """Train, test, append a row to results.jsonl beside the encoder, return it; on all ranks.

    The row's accuracy: `top1` and `top5` after the last epoch, and `best_top1` of all epochs with
    the number of that one (which of both the published tables report is not known).

    Raises:
        UserError: encoder, data or options do not fit.
    """
    with together():
        device = pick_device(options.device)
        _, metadata, path = load_encoder(options.encoder)
        known, asked = labelled_pair(options.data, options.test_data)
    plain = recipe_of(metadata)
    drops = options.drop_epochs
    if drops is None:
        drops = tuple(round(share * options.epochs) for share in DROPS)
    cache = cache_of(options.cache, options.cache_gb)
    out = Path(options.out or path.parent / f"linear-{known.card.name}-{options.seed}")
    config = TrainConfig(
        data=options.data,
        out=str(out),
        method=LinearProbeConfig(path=str(path), sha256=digest(path)),
        recipe=replace(plain, **SUPERVISED_VIEWS),
        encoder=metadata["encoder"],
        batch_size=options.batch_size,
        epochs=options.epochs,
        optim=OptimConfig(
            base_lr=options.base_lr,
            weight_decay=0.0,
            schedule="steps",
            drop_epochs=drops,
        ),
        seed=options.seed,
        device=options.device,
        log_steps=options.log_steps,
        keep_checkpoints=1,
        cache=options.cache,
        cache_gb=options.cache_gb,
    )

    def each_epoch(method: Method, epoch: int) -> dict[str, float]:
        probe = cast(LinearProbe, method)
        share = max(1, options.batch_size // world_size())
        return test(probe, plain, options.test_data, device, share, cache)

    train(config, each_epoch)
    with together():
        lines = (out / "metrics.jsonl").read_text().splitlines()
        epochs = [row for row in map(json.loads, lines) if "top1" in row]
        best = max(epochs, key=lambda row: row["top1"])
        last = epochs[-1]
        row = results.row_of(
            "linear",
            metadata,
            known,
            asked,
            {"top1": last["top1"], "top5": last["top5"], "best_top1": best["top1"]},
            best_epoch=best["epoch"],
            epochs=options.epochs,
            batch_size=options.batch_size,
            base_lr=options.base_lr,
            drop_epochs=list(drops),
            seed=options.seed,
        )
        if is_main():
            results.append(path.parent, [row])
    return row


@torch.no_grad()
def test(
    probe: LinearProbe,
    recipe: Recipe,
    url: str,
    device: torch.device,
    batch_size: int,
    cache: Cache | None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on centre crops; over all ranks each image counts once."""
    views = plain_views(url, recipe, device, batch_size, cache)
    precision = pick_precision("auto", device)
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


def sentence(row: dict[str, Any]) -> str:
    """The row for a person."""
    accuracy = row["accuracy"]
    return (
        f"linear probe of {row['encoder']} on {row['data']}, {row['test_images']} images: "
        f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%} after {row['epochs']} epochs "
        f"(best top-1 {accuracy['best_top1']:.2%}, epoch {row['best_epoch']})"
    )
