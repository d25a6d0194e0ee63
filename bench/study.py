"""A study on real data: the methods against each other, and the ablation of branches.

Every arm trains with the same settings for the same number of images, which were fixed before the
first run; an arm differs in its method and recipe alone. Encoders are evaluated by kNN and by a
linear probe on the pretraining's own classes, and by a linear probe on each transfer set. What is
finished is not done again: the same command goes on arm by arm, inside one at its last checkpoint.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from pipeline.recipes import RECIPES, Recipe
from schemas import ShardDataset, UserError
from schemas.settings import defaults_of, differences, plain, sentence
from train.config import TrainConfig
from train.evaluate import knn, linear, results, tables
from train.methods import ADIOSConfig, MaskCoConfig, MoCoConfig, SimCLRConfig
from train.metrics_logger import is_step
from train.optim import OptimConfig
from train.trainer import train

FILLS = ("hp", "blur", "mean")
OF_A_CALL = {"shards", "out", "arms", "seeds", "device"}
"""Options that may differ from one call to the next; all others are the study's own."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pretrain every arm with every seed, evaluate, and write a table and a plot."""

    shards: Path = tyro.MISSING
    """Folder of datasets: train, val, and for each transfer set NAME-train and NAME-test."""
    out: Path = Path("out/study")
    """Folder of the runs, of study.md and study.png."""
    arms: tuple[str, ...] = ()
    """Names of arms; all when not given."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is trained once with each."""
    encoder: str = "resnet18"
    """Of all arms."""
    crop_size: int = 112
    """Side of a view in pixels."""
    batch_size: int = 256
    """Images a step."""
    epochs: int = 100
    """Times the images are seen by each arm (ours)."""
    queue: int = 4096
    """Keys that are remembered; below the number of images (ours: the released 65,536 is above)."""
    base_lr: float = 0.06
    """Learning rate at a batch of 256 (ours)."""
    ema_momentum: float = 0.99
    """Of the momentum encoder, as the stronger recipe on ImageNet-100 has it."""
    probe_epochs: int = 30
    """Of every linear probe; its rate drops at 60 % and 80 % of them."""
    neighbours: tuple[int, ...] = (20, 200)
    """Of the kNN accuracy."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds a GPU."""


@dataclass(frozen=True)
class Arm:
    """What an arm has of its own."""

    recipe: Recipe
    method: Any


def arms(options: Options) -> dict[str, Arm]:
    """Every arm. Where the ablation masks the query alone it is `FILL-no-hard`."""
    memory: dict[str, Any] = dict(queue=options.queue, ema_momentum=options.ema_momentum)
    moco, simclr = MoCoConfig(**memory), SimCLRConfig()
    found = {
        "none": Arm(RECIPES["none"], moco),
        "mscn": Arm(RECIPES["mscn"], moco),
        "adios": Arm(RECIPES["none"], ADIOSConfig(objective="moco", hidden=None, **memory)),
        "maskco": Arm(RECIPES["maskco"], MaskCoConfig(**memory)),
    }
    for fill in FILLS:
        recipe = RECIPES[fill]
        alone = replace(recipe, hard_negatives=0)
        found[fill] = Arm(recipe, moco)
        found[f"{fill}-no-hard"] = Arm(alone, moco)
        found[f"{fill}-key"] = Arm(replace(alone, branch="key"), moco)
        found[f"{fill}-both"] = Arm(replace(alone, branch="both"), moco)
    for name in ("none", "mscn", *FILLS):
        found[f"simclr-{name}"] = Arm(RECIPES[name], simclr)
    found["simclr-adios"] = Arm(RECIPES["none"], ADIOSConfig(hidden=None))
    return found


def config_of(options: Options, name: str, seed: int) -> TrainConfig:
    """Equal for all arms but for the method and the recipe; all see as many images."""
    arm = arms(options)[name]
    return TrainConfig(
        data=str(options.shards / "train"),
        out=str(options.out / f"{name}-{seed}"),
        method=arm.method,
        recipe=arm.recipe,
        encoder=options.encoder,
        crop_size=options.crop_size,
        batch_size=options.batch_size,
        epochs=options.epochs,
        optim=OptimConfig(base_lr=options.base_lr),
        seed=seed,
        device=options.device,
        keep_checkpoints=1,
    )


def transfers(shards: Path) -> dict[str, tuple[str, str]]:
    """Name -> its training and its test shards."""
    found = {}
    for train_set in sorted(shards.glob("*-train")):
        name = train_set.name.removesuffix("-train")
        test_set = shards / f"{name}-test"
        if not test_set.is_dir():
            raise UserError(f"{test_set}: no such dataset, beside {train_set}")
        found[name] = str(train_set), str(test_set)
    return found


def run(options: Options) -> None:
    """Train and evaluate whatever is missing, arm after arm."""
    known = arms(options)
    names = options.arms or tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown arm {name!r}: there are {', '.join(known)}")
    keep_settings(options)
    sets = {"": (str(options.shards / "train"), str(options.shards / "val"))}
    sets |= transfers(options.shards)
    for urls in sets.values():
        for url in urls:
            ShardDataset.open(url)  # a missing one is told before hours of training
    for seed in options.seeds:  # all arms once, before any is trained again
        for name in names:
            print(f"\n== {name}, seed {seed}", flush=True)
            config = config_of(options, name, seed)
            train(config)
            evaluate(options, Path(config.out), sets, seed)


def keep_settings(options: Options) -> None:
    """Write the study's settings when it begins; all its arms have them.

    Raises:
        UserError: it was begun with others.
    """
    path = options.out / "study.json"
    own = {name: plain(value) for name, value in vars(options).items() if name not in OF_A_CALL}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own, indent=2) + "\n")
    begun = json.loads(path.read_text())
    defaults = {n: value for n, value in defaults_of(Options).items() if n not in OF_A_CALL}
    if found := differences(begun, own, defaults):
        raise UserError(
            f"{path}: the study was begun with other settings: {sentence(found)}; choose another "
            "--out"
        )


def folders(options: Options) -> list[Path]:
    """Of the runs that were asked for."""
    names = options.arms or tuple(arms(options))
    return [options.out / f"{name}-{seed}" for name in names for seed in options.seeds]


def evaluate(options: Options, folder: Path, sets: dict[str, tuple[str, str]], seed: int) -> None:
    """The evaluations that this run has not had yet."""
    done = results.collect([str(folder)]) if (folder / results.RESULTS).exists() else []
    had = {(row["protocol"], row["data_digest"]) for row in done}
    for name, (known, asked) in sets.items():
        digest = ShardDataset.open(known).digest
        if not name and ("knn", digest) not in had:
            knn_options = knn.KnnOptions(
                encoder=str(folder),
                data=known,
                test_data=asked,
                neighbors=options.neighbours,
                batch_size=options.batch_size,
                device=options.device,
            )
            print(knn.format_table(knn.evaluate(knn_options)))
        if ("linear", digest) not in had:
            probe = linear.LinearOptions(
                encoder=str(folder),
                data=known,
                test_data=asked,
                batch_size=min(options.batch_size, len(ShardDataset.open(known))),
                epochs=options.probe_epochs,
                seed=seed,
                device=options.device,
            )
            print(linear.format_result(linear.evaluate(probe)))


def report(options: Options) -> str:
    """study.md and study.png; returns the text."""
    rows = results.collect(map(str, folders(options)))
    data = ShardDataset.open(options.shards / "train").card.name
    settings = {name: str(value) for name, value in vars(options).items()}
    text = "\n\n".join(
        [
            "# Study",
            "Mean ± standard deviation over seeds. All arms share these settings: "
            + ", ".join(f"{name} {value}" for name, value in settings.items() if name != "out")
            + ".",
            tables.format_table(rows, "knn"),
            tables.format_table(rows, "linear"),
            "Which branch is masked, without hard negatives:",
            tables.format_branch_table(
                [r for r in rows if tables.get_setting(r, "recipe.hard_negatives") == 0],
                "linear",
                data,
            ),
            "Training time of a run:",
            times(options),
        ]
    )
    (options.out / "study.md").write_text(text + "\n")
    plot(rows, data, options.out / "study.png")
    return text


def times(options: Options) -> str:
    """Seconds that the steps of each arm took, medians over its seeds, as Markdown."""
    lines = ["| arm | seconds |", "| --- | ---: |"]
    for name in options.arms or tuple(arms(options)):
        seconds = []
        for seed in options.seeds:
            path = options.out / f"{name}-{seed}" / "metrics.jsonl"
            steps = [r for r in map(json.loads, path.read_text().splitlines()) if is_step(r)]
            seconds.append(sum(options.batch_size / row["images_per_second"] for row in steps))
        lines.append(f"| {name} | {statistics.median(seconds):.0f} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], data: str, path: Path) -> None:
    """Linear accuracy of every arm on the pretraining's classes: runs as dots, means as bars."""
    import matplotlib  # slow to import, and needed here alone

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["protocol"] == "linear" and row["data"] == data]
    values: dict[str, list[float]] = {}
    for row in chosen:
        values.setdefault(tables.name_training(row), []).append(tables.get_headline(row))
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(values) + 1.2), layout="constrained")
    for place, found in enumerate(values.values()):
        axes.barh(place, statistics.mean(found), color="#9ecae1")
        axes.plot(found, [place] * len(found), "o", color="#08519c", markersize=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(f"linear probe on {data}, top-1 %")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
