"""Show what masking by saliency is for, on generated scenes, running each step by its command.

    make demo          or          python examples/demo.py --out out/demo

No download and no GPU. Saliency goes into shards, a contact sheet shows the views, and MoCo v2 is
trained three times for the same number of steps: on plain views, on views behind the high-pass
filter of the `hp` recipe, and on views that `hp` also masks. At the end it prints one table and
draws one picture: the kNN accuracy of the three encoders and of an untrained one. After an
interruption, run the same command again to resume.
"""

import argparse
import shlex
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from schemas import ShardDataset
from schemas.json_lines import read_json_lines

TRAIN_SCENES, TEST_SCENES = 1600, 1200
CROP = 56
EPOCHS = 6
NEIGHBORS = 200
"""Neighbors that vote; with 20, the accuracy varies twice as much with the seed."""
COLORS = ("#bbb", "#88a", "#7a9", "#c63")
SETTINGS = (
    *("--method", "moco", "--encoder", "timm:regnetx_002", "--crop-size", CROP, "--device", "cpu"),
    *("--batch-size", 64, "--queue", 512),
    # The published numbers are for 200 epochs of 126,689 images; these learn within 150 steps.
    *("--ema-momentum", 0.99, "--lr", 0.06),
)
"""Options of all trainings, which differ only in the recipe."""


@dataclass(frozen=True)
class Arm:
    """One training of the comparison.

    Attributes:
        folder: its folder below `--out`.
        recipe: its recipe, as options.
        has_baseline: True if an untrained encoder is evaluated on the same images.
    """

    name: str
    folder: str
    recipe: tuple[object, ...]
    has_baseline: bool = True


ARMS = (
    Arm("MoCo v2", "plain", ("--recipe", "none")),
    Arm("MoCo v2, high-pass", "high-pass", ("--recipe", "none", "--recipe.high-pass")),
    Arm(
        "MoCo v2, high-pass, masked (hp)",
        "masked",
        ("--recipe", "hp", "--recipe.hard-negatives", 0),
        has_baseline=False,
    ),
)


@dataclass(frozen=True)
class Row:
    """One line of the table: accuracies in 0 .. 1."""

    name: str
    accuracy: float


def run_step(title: str, command: str, *arguments: object) -> None:
    """Print and run an installed command; exit with its status if it fails."""
    script = Path(sysconfig.get_path("scripts")) / command
    if not script.exists():
        sys.exit(f"error: {command} is not installed beside {sys.executable}: run `make setup`")
    words = [str(word) for word in arguments]
    print(f"\n== {title}\n$ {shlex.join([command, *words])}", flush=True)
    status = subprocess.run([script, *words], check=False).returncode
    if status:
        sys.exit(status)


def precompute_arguments(out: Path, split: str, scenes: int) -> list[object]:
    return [
        *("--dataset", "demo", "--split", split, "--limit", scenes, "--shard-samples", 200),
        *("--estimator", "spectral", "--out", out / split),
    ]


def train_arguments(out: Path, arm: Arm, epochs: int, seed: int) -> list[object]:
    return [
        *("--data", out / "train", "--out", out / arm.folder, *arm.recipe, *SETTINGS),
        *("--epochs", epochs, "--seed", seed),
    ]


def evaluate_arguments(out: Path, arm: Arm) -> list[object]:
    return [
        *("knn", "--encoder", out / arm.folder, "--data", out / "train"),
        *("--test-data", out / "test", "--neighbors", NEIGHBORS),
        *(["--baseline"] if arm.has_baseline else []),
    ]


def latest_accuracy(out: Path, arm: Arm) -> dict[str, float]:
    """Return the last accuracy of the `trained` and of the `untrained` weights of an arm."""
    results = read_json_lines(out / arm.folder / "results.jsonl")
    # an evaluation by hand, or by an earlier version of this file, may have used other numbers
    return {
        row["weights"]: row["accuracy"][str(NEIGHBORS)]
        for row in results
        if str(NEIGHBORS) in row["accuracy"]
    }


def collect_rows(out: Path) -> list[Row]:
    """Return the lines of the table.

    An untrained encoder has two accuracies, on plain and on high-pass images; the table shows the
    higher one.
    """
    accuracies = [latest_accuracy(out, arm) for arm in ARMS]
    untrained = max(of_arm.get("untrained", 0.0) for of_arm in accuracies)
    trained = [
        Row(arm.name, of_arm["trained"]) for arm, of_arm in zip(ARMS, accuracies, strict=True)
    ]
    return [Row("untrained encoder", untrained), *trained]


def format_table(rows: list[Row]) -> str:
    width = max(len(row.name) for row in rows)
    head = f"{'':<{width}}  kNN top-1"
    return "\n".join([head, *(f"{row.name:<{width}}  {row.accuracy:>9.1%}" for row in rows)])


def draw_picture(rows: list[Row], path: Path, test_images: int) -> None:
    """Draw the table as a bar chart."""
    import matplotlib as mpl  # imported here: it takes a second and is needed only at the end

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.6), layout="constrained")
    names = [row.name for row in rows]
    bars = axes.barh(names, [100 * row.accuracy for row in rows], color=COLORS)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set(xlim=(0, 100), xlabel=f"kNN top-1 on {test_images} generated scenes, %")
    axes.invert_yaxis()
    figure.savefig(path, dpi=150, metadata={"Software": None})  # equal runs give equal bytes
    pyplot.close(figure)


def report(out: Path, seconds: float) -> str:
    rows = collect_rows(out)
    test = ShardDataset.open(out / "test")
    draw_picture(rows, out / "demo.png", len(test))
    last = out / ARMS[-1].folder
    steps = [row for row in read_json_lines(last / "metrics.jsonl") if "loss" in row]
    return "\n".join(
        [
            f"\n== result, after {seconds:.0f} s",
            format_table(rows),
            "",
            f"all trained for {steps[-1]['step']} steps; {len(test)} test images of "
            f"{len(test.classes)} classes; k = {NEIGHBORS}",
            f"picture     {out / 'demo.png'}",
            f"views       {out / 'preview.png'}",
            f"encoder     {last / 'encoder.safetensors'}",
            f"curves      tensorboard --logdir {out}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all of it")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of each training")
    parser.add_argument("--seed", type=int, default=0, help="random seed of all trainings")
    options = parser.parse_args()
    out, start = options.out, time.monotonic()

    for split, scenes in (("train", TRAIN_SCENES), ("test", TEST_SCENES)):
        run_step(
            f"saliency of {scenes} generated scenes ({split})",
            "saliency-precompute",
            *precompute_arguments(out, split, scenes),
        )
    run_step(
        "the views that the network will see",
        *("saliency-pipeline", "preview", "--data", out / "train", "--recipe", "hp"),
        *("--crop-size", CROP, "--out", out / "preview.png"),
    )
    for arm in ARMS:
        arguments = train_arguments(out, arm, options.epochs, options.seed)
        run_step(f"train {arm.name}", "saliency-train", *arguments)
        run_step("its kNN accuracy", "saliency-evaluate", *evaluate_arguments(out, arm))
    print(report(out, time.monotonic() - start))


if __name__ == "__main__":
    main()
