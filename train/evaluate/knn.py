"""The command `knn`: measure the weighted kNN accuracy of a frozen encoder."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from schemas.counts import format_count
from schemas.settings import flatten
from train.config import NEIGHBORS, make_cache
from train.distributed import is_main, raise_on_all_ranks
from train.encoders import build_untrained_encoder, load_encoder
from train.evaluate import results
from train.features import (
    build_eval_recipe,
    extract_features,
    open_labeled_pair,
    pick_eval_precision,
)
from train.knn import TEMPERATURE, check_neighbors, compute_knn_accuracy
from train.option_ranges import check_ranges
from train.process_group import pick_device


@dataclass(frozen=True, kw_only=True)
class KnnOptions:
    """Measure the weighted kNN accuracy of a frozen encoder."""

    encoder: str = tyro.MISSING
    """Folder of a run, or a file of weights: encoder.safetensors or a foreign checkpoint."""
    data: str = tyro.MISSING
    """Labeled shards whose images are the neighbors."""
    test_data: str | None = None
    """Labeled shards to classify; by default `data` itself, leave-one-out."""
    baseline: bool = False
    """Also evaluate the same architecture untrained, on the same images."""
    neighbors: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--neighbours",))] = NEIGHBORS
    """Numbers of voting neighbors; one accuracy is reported for each."""
    batch_size: int = 64
    """Images per forward pass on each process; does not change the result."""
    seed: int = 0
    """Random seed for the weights of the untrained encoder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds a GPU, else cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the encoder. auto: fp32 for an encoder that was trained in fp32; otherwise bf16
    if the device supports it."""
    rank_timeout: int = 600
    """Seconds after which a process that does not answer counts as dead and the job ends."""
    cache: str | None = None
    """Folder on a local disk that keeps downloaded shards; by default ~/.cache/saliency-shards for
    a remote dataset and none for a local one."""
    cache_gb: float | None = None
    """Size limit of that folder in GB of 10^9 bytes; by default half of the free disk,
    counting its own files as free."""


def evaluate(options: KnnOptions) -> list[dict[str, Any]]:
    """Evaluate, append rows to results.jsonl beside the encoder, return them; on all ranks.

    Raises:
        UserError: unsuitable encoder, data or options.
    """
    with raise_on_all_ranks():
        check_ranges(flatten(options))
        device = pick_device(options.device)
        torch.backends.cuda.matmul.allow_tf32 = False  # kNN compares close similarities
        encoder, metadata, path = load_encoder(options.encoder, notes_images=True)
        if is_main():
            results.check_writable(path.parent)
        train, test = open_labeled_pair(options.data, options.test_data)
        check_neighbors(options.neighbors, len(train) - (test is None))

    encoders: list[tuple[str, nn.Module]] = [("trained", encoder)]
    if options.baseline:
        encoders.append(("untrained", build_untrained_encoder(metadata, options.seed)))
    recipe = build_eval_recipe(metadata)
    cache = make_cache(options.cache, options.cache_gb)
    precision = pick_eval_precision(options.precision, metadata, device)

    def extract(model: nn.Module, url: str) -> tuple[torch.Tensor, torch.Tensor]:
        return extract_features(
            model, recipe, url, device, options.batch_size, precision, cache=cache
        )

    rows: list[dict[str, Any]] = []
    for weights, model in encoders:
        train_features = extract(model, options.data)
        test_features = extract(model, options.test_data) if options.test_data else None
        accuracy = compute_knn_accuracy(
            train_features,
            test_features,
            classes=len(train.classes),
            neighbors=options.neighbors,
        )
        rows.append(
            results.build_row(
                "knn",
                metadata,
                train,
                test,
                {str(k): value for k, value in accuracy.items()},
                weights=weights,
                split="test data" if test else "leave-one-out",
                temperature=TEMPERATURE,
                neighbors=list(options.neighbors),
                seed=options.seed,
                precision=precision,
            )
        )
    with raise_on_all_ranks():
        if is_main():
            results.append(path.parent, rows)
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as a small table for the terminal."""
    first = rows[0]
    names = list(first["accuracy"])
    lines = [
        f"kNN top-1 of {first['encoder']}, {format_count(first['test_images'], 'image')}, "
        f"{first['split']}, "
        f"{'high-pass' if first['high_pass'] else 'plain'} {first['crop_size']} px",
        "weights    " + "".join(f"{'k=' + k:>9}" for k in names),
    ]
    for row in rows:
        cells = "".join(f"{100 * row['accuracy'][k]:>8.2f}%" for k in names)
        lines.append(f"{row['weights']:<11}{cells}")
    return "\n".join(lines)
