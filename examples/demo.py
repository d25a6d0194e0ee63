"""The whole job on generated scenes, each step by the command that a user would give.

    make demo          or          python examples/demo.py --out out/demo

No download, no GPU: saliency into shards, a contact sheet, MoCo v2 with the hp recipe on two
processes, and the encoder's kNN accuracy beside an untrained one's. Run again, it goes on where it
was stopped.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from schemas import ShardDataset

TRAIN_SCENES, VAL_SCENES = 1600, 400
CROP = 112


def step(title: str, *command: object) -> None:
    words = [str(word) for word in command]
    shown = [Path(words[0]).name, *words[1:]]
    print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
    # each rank sets its own threads; with this, torchrun does not warn of its default
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if "torchrun" in words[0] else None
    status = subprocess.run(words, check=False, env=environment).returncode
    if status:
        sys.exit(status)


def precompute(out: Path, split: str, scenes: int) -> None:
    step(
        f"saliency of {scenes} generated scenes ({split})",
        *(sys.executable, "-m", "precompute", "--dataset", "demo", "--split", split),
        *("--limit", scenes, "--shard-samples", 200, "--estimator", "spectral", "--out", out),
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(out: Path, seconds: float) -> str:
    train = ShardDataset.open(out / "train")
    steps = [row for row in rows(out / "run" / "metrics.jsonl") if "loss" in row]
    rates = sorted(row["images_per_second"] for row in steps)
    results = rows(out / "run" / "results.jsonl")
    latest = {row["weights"]: row["accuracy"]["20"] for row in results}
    losses = f"{steps[0]['loss']:.2f} -> {steps[-1]['loss']:.2f}"
    return "\n".join(
        [
            f"\n== report, after {seconds:.0f} s",
            f"shards      {train.url}: {len(train)} samples, {len(train.classes)} classes",
            f"views       {out / 'preview.png'}",
            f"encoder     {out / 'run' / 'encoder.safetensors'}",
            f"curves      tensorboard --logdir {out / 'run'}",
            f"training    {len(steps)} steps, median {rates[len(rates) // 2]:.0f} images/s",
            f"loss        {losses} (need not fall: the hard negative counts twice, rho = 2)",
            f"kNN (k=20)  {latest['trained']:.1%} pretrained, {latest['untrained']:.1%} untrained",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all of it")
    parser.add_argument("--epochs", type=int, default=5, help="of pretraining")
    options = parser.parse_args()
    out, start = options.out, time.monotonic()

    precompute(out / "train", "train", TRAIN_SCENES)
    precompute(out / "val", "val", VAL_SCENES)
    step(
        "what the network will see",
        *(sys.executable, "-m", "pipeline", "preview", "--data", out / "train"),
        *("--recipe", "hp", "--crop-size", CROP, "--out", out / "preview.png"),
    )
    step(
        "MoCo v2 with the hp recipe on two processes",
        *(Path(sysconfig.get_path("scripts")) / "torchrun", "--standalone"),
        *("--local-addr", "127.0.0.1", "--nproc-per-node", 2),
        *("-m", "train", "--data", out / "train", "--out", out / "run", "--method", "moco"),
        *("--recipe", "hp", "--encoder", "resnet18", "--crop-size", CROP, "--device", "cpu"),
        *("--batch-size", 64, "--epochs", options.epochs, "--queue", 512),
        # the published numbers are for 200 epochs of 126,689 images; these learn within 125 steps
        *("--ema-momentum", 0.99, "--lr", 0.06),
    )
    step(
        "its neighbours, against an untrained encoder",
        *(sys.executable, "-m", "train.evaluate", "knn", "--encoder", out / "run"),
        *("--data", out / "train", "--test-data", out / "val", "--baseline"),
    )
    print(report(out, time.monotonic() - start))


if __name__ == "__main__":
    main()
