"""Run a study on real data: pretrain each arm under the same settings, then evaluate its encoder.

The settings are fixed beforehand (`arms`). An encoder is evaluated by kNN and by a linear
probe on the classes of its pretraining, and by a linear probe on each transfer set. A run that was
stopped resumes from its last checkpoint. A finished run is a file in `rows`, which is committed, so
that nothing is trained twice even if the runs themselves are lost.

    python -m examples.study --shards out/study/shards --side-by-side 2
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from bench.table import describe_machine
from examples.study.arms import SCALES, Arm, ScaleName, Tier, build_arms, build_config
from schemas import ShardDataset, UserError
from schemas.cli import lookup
from schemas.json_lines import read_json_lines
from schemas.settings import find_differences, format_differences
from schemas.storage import Store
from schemas.versions import version_of
from train.config import (
    NEIGHBORS,
    TrainConfig,
    collect_default_settings,
    collect_settings,
    use_current_names,
)
from train.evaluate import knn, linear, results
from train.metrics_logger import is_step
from train.trainer import train

NICENESS = 10
"""Niceness of the parallel runs (our choice): other work on the machine takes precedence."""
VERSIONS = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Pretrain every arm with every seed, evaluate, and write a table and a plot."""

    shards: Path = tyro.MISSING
    """Folder of datasets: train, val, and for each transfer set NAME-train and NAME-test."""
    out: Path = Path("out/study")
    """Folder of the runs."""
    rows: Path = Path("examples/study/results")
    """Folder for the results of finished runs, one file each; commit it."""
    scale: ScaleName = "cpu"
    """Settings of all arms: cpu (imagenette160 on CPU cores), gpu (ResNet-50 on ImageNet-100 with
    its published settings) or gpu-small (imagenette on one GPU).
    """
    tier: Literal[1, 2] = 1
    """Tier of the study. 1: all arms, one seed. 2: the main arms, longer, three seeds."""
    arms: tuple[str, ...] = ()
    """Names of the arms; by default those of the tier."""
    seeds: tuple[int, ...] = ()
    """Random seeds; by default those of the tier."""
    epochs: int | None = None
    """Epochs of pretraining; by default those of the tier."""
    side_by_side: int = 1
    """Number of parallel runs, each pinned to its own CPU core, with one thread and a low priority;
    0 trains in this process, as needed on a machine with one GPU.
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the trainings; auto is cuda where torch finds a GPU."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        name: ARM-EPOCHS-SEED, the name of its folder and of its row.
    """

    arm: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.config.epochs}-{self.seed}"


def choose_tier(options: Options) -> Tier:
    """Return the arms, seeds and epochs selected by the options."""
    tier = SCALES[options.scale].tiers[options.tier]
    return Tier(
        epochs=options.epochs or tier.epochs,
        seeds=options.seeds or tier.seeds,
        arms=options.arms or tier.arms,
    )


def list_runs(options: Options) -> list[Run]:
    """Return all runs in order: every arm once before any is trained with another seed.

    Raises:
        UserError: there is no arm of a given name.
    """
    scale, tier = SCALES[options.scale], choose_tier(options)
    arms = build_arms(scale)
    chosen: dict[str, Arm] = {name: lookup("arm", name, arms) for name in tier.arms}
    return [
        Run(
            name,
            seed,
            build_config(
                scale,
                arm,
                data=str(options.shards / "train"),
                out=str(options.out / options.scale / f"{name}-{tier.epochs}-{seed}"),
                epochs=tier.epochs,
                seed=seed,
                device=options.device,
            ),
        )
        for seed in tier.seeds
        for name, arm in chosen.items()
    ]


def run(options: Options) -> None:
    """Train and evaluate every run that has no row yet.

    Raises:
        UserError: a dataset is missing, a row was made with other settings, or runs failed (the
            message names their logs).
    """
    runs = list_runs(options)
    for urls in find_evaluation_sets(options.shards).values():
        for url in urls:
            ShardDataset.open(url)  # report a missing one before hours of training
    missing = [planned for planned in runs if find_row(options, planned) is None]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    if options.side_by_side == 0:
        for missing_run in missing:
            print(f"\n== {missing_run.name}", flush=True)
            finish(options, missing_run)
        return
    failed = [log for log in run_side_by_side(options, missing) if log is not None]
    if failed:
        raise UserError(f"{len(failed)} runs failed; see {', '.join(map(str, failed))}")


def run_side_by_side(options: Options, runs: Sequence[Run]) -> Iterator[Path | None]:
    """Run each training in its own process; yield the log path of a failed run, None otherwise."""
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    available = sorted(os.sched_getaffinity(0))
    for place in range(options.side_by_side):
        cores.put(available[place % len(available)])
    shown = threading.Lock()

    def work(run: Run) -> Path | None:
        core = cores.get()
        log = Path(run.config.out).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        try:
            with log.open("a") as output:
                ended = subprocess.run(
                    build_child_command(options, run, core),
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=output,
                    stderr=output,
                    check=False,
                )
        finally:
            cores.put(core)
        state = "finished" if ended.returncode == 0 else f"FAILED ({ended.returncode})"
        with shown:
            print(f"{run.name} {state} after {time.monotonic() - start:.0f} s: {log}", flush=True)
        return log if ended.returncode else None

    with ThreadPoolExecutor(options.side_by_side) as pool:
        yield from pool.map(work, runs)


def build_child_command(options: Options, run: Run, core: int) -> list[str]:
    """Return the command that trains one run in a process pinned to `core`."""
    # Pin the process before importing torch, which counts the cores.
    code = (
        f"import os, sys; os.sched_setaffinity(0, {{{core}}}); os.nice({NICENESS}); "
        "from examples.study import runs; from schemas.cli import parse, run; "
        "run(lambda: runs.run(parse(runs.Options, sys.argv[1:])))"
    )
    return [
        *(sys.executable, "-c", code, "--side-by-side", "0", "--scale", options.scale),
        *("--shards", str(options.shards), "--out", str(options.out), "--rows", str(options.rows)),
        *("--arms", run.arm, "--seeds", str(run.seed), "--epochs", str(run.config.epochs)),
        *("--device", options.device),
    ]


def finish(options: Options, run: Run) -> None:
    """Train and evaluate one run, and write its row."""
    train(run.config)
    evaluate(options, run)
    row = {
        "arm": run.arm,
        "seed": run.seed,
        "epochs": run.config.epochs,
        "accuracy": read_accuracies(options, run),
        "train_seconds": round(sum_training_seconds(run)),
        "settings": to_comparable(options, run),
        "machine": describe_machine(),
        "versions": {name: version_of(name) for name in VERSIONS},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    path = get_row_path(options, run)
    Store(path.parent).write(path.name, (json.dumps(row, indent=1) + "\n").encode())


def get_row_path(options: Options, run: Run) -> Path:
    return options.rows / options.scale / f"{run.name}.json"


def find_row(options: Options, run: Run) -> dict[str, Any] | None:
    """Return the row of a finished run, or None if there is none.

    Raises:
        UserError: the row was made with other settings.
    """
    path = get_row_path(options, run)
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    defaults = collect_default_settings(type(run.config.method))
    saved, current = use_current_names(row["settings"]), to_comparable(options, run)
    # older rows do not say which images they were tested on
    defaults |= {name: value for name, value in current.items() if name.startswith("test.")}
    if changes := find_differences(saved, current, defaults):
        raise UserError(
            f"{path}: this run was made with other settings: {format_differences(changes)}; "
            "choose another --rows, or remove the file to repeat the run"
        )
    return row


def to_comparable(options: Options, run: Run) -> dict[str, Any]:
    """Return the settings that decide a run's result, flat, as JSON gives them back."""
    sets = find_evaluation_sets(options.shards)
    digests = {name: [ShardDataset.open(url).digest for url in urls] for name, urls in sets.items()}
    return {
        **collect_settings(run.config, digests[""][0]),
        "probe_epochs": SCALES[options.scale].probe_epochs,
        **{f"transfer.{name}": train_digest for name, (train_digest, _) in digests.items() if name},
        **{
            f"test.{name or 'pretraining'}": test_digest
            for name, (_, test_digest) in digests.items()
        },
    }


def find_evaluation_sets(shards: Path) -> dict[str, tuple[str, str]]:
    """Return the shards to train a probe on and those to test it on, by name.

    The name is "" for the data of the pretraining, otherwise the name of a transfer set.

    Raises:
        UserError: a transfer set has no test shards.
    """
    sets = {"": (str(shards / "train"), str(shards / "val"))}
    for train_set in sorted(shards.glob("*-train")):
        name = train_set.name.removesuffix("-train")
        test_set = shards / f"{name}-test"
        if not test_set.is_dir():
            raise UserError(f"{test_set}: no such dataset, beside {train_set}")
        sets[name] = str(train_set), str(test_set)
    return sets


def evaluate(options: Options, run: Run) -> None:
    """Run the evaluations that a trained run still lacks."""
    folder, config = Path(run.config.out), run.config
    exists = (folder / results.RESULTS).exists()
    done = results.collect([str(folder)]) if exists else []
    finished = {(row["protocol"], row["data_digest"], row.get("test_digest")) for row in done}
    for name, (train_set, test_set) in find_evaluation_sets(options.shards).items():
        dataset = ShardDataset.open(train_set)
        digests = dataset.digest, ShardDataset.open(test_set).digest
        if not name and ("knn", *digests) not in finished:
            knn_options = knn.KnnOptions(
                encoder=str(folder),
                data=train_set,
                test_data=test_set,
                neighbors=NEIGHBORS,
                batch_size=config.batch_size,
                device=options.device,
            )
            print(knn.format_table(knn.evaluate(knn_options)), flush=True)
        if ("linear", *digests) not in finished:
            probe = linear.LinearOptions(
                encoder=str(folder),
                data=train_set,
                test_data=test_set,
                out=str(folder / f"linear-{name or dataset.card.name}"),
                batch_size=min(config.batch_size, len(dataset)),
                epochs=SCALES[options.scale].probe_epochs,
                seed=run.seed,
                device=options.device,
            )
            print(linear.format_result(linear.evaluate(probe)), flush=True)


def read_accuracies(options: Options, run: Run) -> dict[str, float]:
    """Return the accuracy of each evaluation of a run as a share of the test images."""
    names = {}
    for name, (train_set, _) in find_evaluation_sets(options.shards).items():
        dataset = ShardDataset.open(train_set)
        names[dataset.digest] = name or dataset.card.name
    shares: dict[str, float] = {}
    for row in results.collect([run.config.out]):
        if row["protocol"] == "knn":
            shares |= {f"knn {k}": row["accuracy"][str(k)] for k in NEIGHBORS}
        else:
            shares[f"linear {names[row['data_digest']]}"] = row["accuracy"]["top1"]
    return shares


def sum_training_seconds(run: Run) -> float:
    """Return the seconds that the steps of a run took."""
    steps = [row for row in read_json_lines(Path(run.config.out) / "metrics.jsonl") if is_step(row)]
    return sum(run.config.batch_size / row["images_per_second"] for row in steps)
