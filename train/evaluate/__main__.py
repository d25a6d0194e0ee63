"""Evaluate a trained encoder by its nearest neighbours.

    python -m train.evaluate --encoder RUN --data URL [--test-data URL] [--baseline]

Without test data each image is classified by all the others (leave-one-out). Encoders of a
high-pass recipe see high-pass images here too. Each evaluation is a line in RUN/results.jsonl.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import torch
import tyro
from torch import nn

from schemas import UserError
from schemas.cli import parse, run
from train.distributed import pick_device, session
from train.encoders import load_encoder, untrained_encoder
from train.evaluate.features import extract, labelled
from train.evaluate.knn import NEIGHBOURS, TEMPERATURE, knn_accuracy


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Weighted kNN accuracy of a frozen encoder."""

    encoder: str = tyro.MISSING
    """A run's folder, or an encoder.safetensors."""
    data: str = tyro.MISSING
    """Labelled shards whose images are the neighbours."""
    test_data: str | None = None
    """Labelled shards to classify; without it `data` itself, leaving each image itself out."""
    baseline: bool = False
    """Also evaluate the same architecture untrained, on the same images."""
    neighbours: tuple[int, ...] = NEIGHBOURS
    """Numbers of neighbours that vote, one accuracy each."""
    batch_size: int = 64
    """Images at a time; changes no result."""
    seed: int = 0
    """Of the untrained encoder's weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Evaluate, append to results.jsonl beside the encoder, and return the rows."""
    device = pick_device(config.device)
    encoder, metadata, path = load_encoder(config.encoder)
    train = labelled(config.data)
    test = labelled(config.test_data) if config.test_data else None
    if test is not None and test.classes != train.classes:
        raise UserError(f"{config.test_data}: has other classes than {config.data}")
    if not config.neighbours or min(config.neighbours) < 1:
        raise UserError(f"--neighbours {config.neighbours}: each must be at least 1")

    encoders: list[tuple[str, nn.Module]] = [("trained", encoder)]
    if config.baseline:
        encoders.append(("untrained", untrained_encoder(metadata["encoder"], config.seed)))
    rows: list[dict[str, Any]] = []
    for weights, model in encoders:
        known = extract(model, metadata, config.data, device, config.batch_size)
        asked = (
            extract(model, metadata, config.test_data, device, config.batch_size)
            if config.test_data
            else None
        )
        accuracy = knn_accuracy(
            known, asked, classes=len(train.classes), neighbours=config.neighbours
        )
        rows.append(
            {
                "protocol": "knn",
                "weights": weights,
                "accuracy": {str(k): round(value, 6) for k, value in accuracy.items()},
                "temperature": TEMPERATURE,
                "split": "test data" if test else "leave-one-out",
                "train_images": len(train),
                "test_images": len(test or train),
                "data": config.data,
                "data_digest": train.digest,
                "test_data": config.test_data,
                "pretraining": metadata if weights == "trained" else None,
                "encoder": metadata["encoder"],
                "high_pass": metadata["high_pass"] == "True",
                "crop_size": int(metadata["crop_size"]),
                "seed": config.seed,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
    with (path.parent / "results.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
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


def main() -> None:
    with session():
        print(table(evaluate(parse(EvaluateConfig))))


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False  # similarities decide between near neighbours
    run(main)
