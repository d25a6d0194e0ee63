"""The command `knn`: weighted kNN accuracy of a frozen encoder."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import nn

from train.config import cache_of
from train.distributed import is_main, together
from train.encoders import load_encoder, untrained_encoder
from train.evaluate import results
from train.features import extract, labelled_pair, recipe_of
from train.knn import NEIGHBOURS, TEMPERATURE, check_neighbours, knn_accuracy
from train.process_group import pick_device


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Weighted kNN accuracy of a frozen encoder."""

    encoder: str = tyro.MISSING
    """A run's folder, or a file of weights: encoder.safetensors or a checkpoint from elsewhere."""
    data: str = tyro.MISSING
    """Labelled shards whose images are the neighbours."""
    test_data: str | None = None
    """Labelled shards to classify; without it `data` itself, leaving each image itself out."""
    baseline: bool = False
    """Also evaluate the same architecture untrained, on the same images."""
    neighbours: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours that vote, one accuracy each."""
    batch_size: int = 64
    """Images at a time on each process; changes no result."""
    seed: int = 0
    """Of the untrained encoder's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""
    cache: str | None = None
    """Folder on a local disk that keeps shards fetched from elsewhere; ~/.cache/saliency-shards for
    a remote dataset when not given. A local dataset is copied to it only if it is given."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; half of the free disk when not given."""


def evaluate(options: KnnOptions) -> list[dict[str, Any]]:
    """Evaluate, append to results.jsonl beside the encoder, and return the rows; on all ranks.

    Raises:
        UserError: encoder, data or options do not fit.
    """
    with together():
        device = pick_device(options.device)
        torch.backends.cuda.matmul.allow_tf32 = False  # similarities decide between neighbours
        encoder, metadata, path = load_encoder(options.encoder)
        train, test = labelled_pair(options.data, options.test_data)
        check_neighbours(options.neighbours, len(train) - (test is None))

    encoders: list[tuple[str, nn.Module]] = [("trained", encoder)]
    if options.baseline:
        encoders.append(("untrained", untrained_encoder(metadata, options.seed)))
    recipe = recipe_of(metadata)
    cache = cache_of(options.cache, options.cache_gb)

    def features(model: nn.Module, url: str) -> tuple[torch.Tensor, torch.Tensor]:
        return extract(model, recipe, url, device, options.batch_size, cache=cache)

    rows: list[dict[str, Any]] = []
    for weights, model in encoders:
        known = features(model, options.data)
        asked = features(model, options.test_data) if options.test_data else None
        accuracy = knn_accuracy(
            known, asked, classes=len(train.classes), neighbours=options.neighbours
        )
        rows.append(
            results.row_of(
                "knn",
                metadata,
                train,
                test,
                {str(k): value for k, value in accuracy.items()},
                weights=weights,
                split="test data" if test else "leave-one-out",
                temperature=TEMPERATURE,
                seed=options.seed,
            )
        )
    with together():
        if is_main():
            results.append(path.parent, rows)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a few lines for a person."""
    first = rows[0]
    names = list(first["accuracy"])
    lines = [
        f"kNN top-1 of {first['encoder']}, {first['test_images']} images, {first['split']}, "
        f"{'high-pass' if first['high_pass'] else 'plain'} {first['crop_size']} px",
        "weights    " + "".join(f"{'k=' + k:>9}" for k in names),
    ]
    for row in rows:
        cells = "".join(f"{100 * row['accuracy'][k]:>8.2f}%" for k in names)
        lines.append(f"{row['weights']:<11}{cells}")
    return "\n".join(lines)
