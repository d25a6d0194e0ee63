"""The whole job on real shards: it runs, it refuses, and it goes on exactly where it was killed."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file

import train.loop
from pipeline.recipes import RECIPES
from schemas import Sample, UserError, write_dataset
from schemas.cli import TerminatedError
from train.__main__ import main
from train.config import TrainConfig
from train.encoders import load_encoder, untrained_encoder
from train.evaluate.neighbours import KnnOptions, evaluate, table
from train.methods import MoCoConfig
from train.optim import OptimConfig

IMAGES = 26  # 3 steps of 8 and 2 images left out


def write_images(url: Path, label: int | None = None) -> str:
    generator = np.random.default_rng(0)

    def samples():
        for i in range(IMAGES):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((48, 40)).save(file, "JPEG")
            saliency = generator.random((28, 28), dtype=np.float32)
            yield Sample(
                key=f"image{i}",
                image=file.getvalue(),
                extension="jpg",
                saliency=saliency,
                label=i % 2 if label is None else label,
                height=40,
                width=48,
            )

    write_dataset(str(url), samples(), name="test", classes=["a", "b"], shard_samples=10)
    return str(url)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("data") / "shards")


def config(data: str, out: Path, **changes) -> TrainConfig:
    small = TrainConfig(
        data=data,
        out=str(out),
        method=MoCoConfig(queue=20),
        recipe=RECIPES["hp"],
        encoder="resnet18",
        crop_size=28,
        batch_size=8,
        epochs=2,
        log_steps=2,
        device="cpu",
    )
    return replace(small, **changes)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def told(out: Path) -> list[tuple]:
    """What must not depend on how often a run was stopped."""
    names = ("step", "epoch", "loss", "contrastive_accuracy", "lr")
    return [tuple(row[name] for name in names) for row in metrics(out)]


@pytest.fixture(scope="session")
def run(shards, tmp_path_factory) -> Path:
    """A short run, never stopped."""
    out = tmp_path_factory.mktemp("run")
    train.loop.train(config(shards, out))
    return out


def test_run_leaves_its_record(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[0]["lr"] == pytest.approx(0.03 * 8 / 256)
    assert all(row["images_per_second"] > 0 and row["data_wait"] >= 0 for row in rows)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["method.queue"] == 20
    assert written["recipe.crop_size"] == 28
    assert written["precision"] in ("bf16", "fp32")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    assert list((run / "tensorboard").iterdir())


def test_encoder_is_torchvisions_and_was_trained(run):
    tensors = load_file(run / "encoder.safetensors")
    theirs = torchvision.models.resnet18().state_dict()
    assert set(tensors) == {key for key in theirs if not key.startswith("fc.")}
    encoder, metadata, _ = load_encoder(str(run))
    assert metadata["recipe"] == "hp"
    assert metadata["high_pass"] == "True"
    assert metadata["crop_size"] == "28"
    start = untrained_encoder({"encoder": "resnet18"}, seed=0)
    assert not torch.equal(encoder.conv1.weight, start.conv1.weight)
    assert encoder.bn1.num_batches_tracked == 6


def test_stopped_inside_an_epoch_goes_on_exactly(shards, run, tmp_path, monkeypatch):
    """Stopped after step 5, beyond the last checkpoint (4), which lies inside the second epoch."""

    class Stop(Exception):
        pass

    add = train.loop.Meter.add

    def stopping(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == 5:
            raise Stop

    settings = config(shards, tmp_path, checkpoint_steps=2, log_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Meter, "add", stopping)
        with pytest.raises(Stop):
            train.loop.train(settings)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    train.loop.train(settings)
    assert told(tmp_path) == told(run)
    first, second = (load_file(out / "encoder.safetensors") for out in (run, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_once_and_the_run_goes_on_exactly(
    shards, run, tmp_path, monkeypatch, number
):
    """In the middle of an epoch, where no checkpoint was due."""
    add = train.loop.Meter.add

    def interrupted(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == 2:
            os.kill(os.getpid(), number)

    settings = config(shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Meter, "add", interrupted)
        with pytest.raises(TerminatedError, match="stopped and saved after step 2; the same") as up:
            train.loop.train(settings)
    assert up.value.status == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train.loop.train(settings)
    assert told(tmp_path) == told(run)
    first, second = (load_file(out / "encoder.safetensors") for out in (run, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_finished_run_is_left_as_it_is(shards, run, capsys):
    before = told(run)
    train.loop.train(config(shards, run))
    assert told(run) == before
    assert "goes on after step 6 of 6" in capsys.readouterr().out


def test_other_settings_and_resume_never_are_refused(shards, run):
    with pytest.raises(UserError, match=r"method\.rho was 2\.0, is 3\.0"):
        train.loop.train(config(shards, run, method=MoCoConfig(queue=20, rho=3.0)))
    with pytest.raises(UserError, match="holds the checkpoints of a run; choose another --out"):
        train.loop.train(config(shards, run, resume="never"))


def test_loss_that_is_not_finite_stops_with_its_step(shards, tmp_path):
    with pytest.raises(UserError, match=r"the loss of step [2-4] is (nan|inf)"):
        train.loop.train(config(shards, tmp_path, optim=OptimConfig(lr=1e30), log_steps=1))
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


ARGUMENTS = {
    "--recipe": "hp",
    "--encoder": "resnet18",
    "--crop-size": "28",
    "--batch-size": "8",
    "--queue": "20",
    "--epochs": "2",
    "--device": "cpu",
}


def command(data: str, out: Path | str, **changes: str) -> list[str]:
    options = {"--data": data, "--out": str(out), **ARGUMENTS, **changes}
    return [part for option in options.items() for part in option]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--recipe", "hpp", "did you mean hp"),
        ("--method", "mocco", "did you mean moco"),
        ("--encoder", "resnet81", "did you mean resnet18"),
        ("--data", "/nowhere/at/all", "no dataset here"),
        ("--out", "/proc/run", "/proc/run"),
        ("--crop-size", "30", "a multiple of the grid"),
        ("--batch-size", "1", "one image a process"),
        ("--batch-size", "0", "at least 1"),
        ("--batch-size", "64", "26 samples are too few"),
        ("--queue", "7", "smaller than the batch"),
        ("--device", "cuda", "no GPU"),
        ("--warmup-epochs", "2", "must be below --epochs 2"),
    ],
)
def test_user_mistakes_are_user_errors(shards, tmp_path, monkeypatch, option, value, message):
    if option == "--batch-size" and value == "64":
        monkeypatch.setitem(ARGUMENTS, "--queue", "64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = command(shards, tmp_path / "run", **{option: value})
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(UserError, match=message):
        main()


def indivisible():
    from train.config import resolved

    try:
        resolved(config("data", Path("out"), batch_size=9), torch.device("cpu"))
    except UserError as error:
        return str(error)
    return "accepted"


def test_batch_that_does_not_divide_among_ranks_is_refused(two_ranks):
    assert set(two_ranks(indivisible)) == {
        "--batch-size 9: does not divide among 2 processes; the nearest that does is 8"
    }


def test_evaluation_appends_rows_and_prints_them(shards, run):
    (run / "results.jsonl").unlink(missing_ok=True)
    options = KnnOptions(
        encoder=str(run), data=shards, baseline=True, neighbours=(1, 5), device="cpu"
    )
    rows = evaluate(options)
    assert [row["weights"] for row in rows] == ["trained", "untrained"]
    assert all(0 <= row["accuracy"]["5"] <= 1 and row["high_pass"] for row in rows)
    evaluate(replace(options, baseline=False, test_data=shards, neighbours=(1,)))
    written = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert written[:2] == rows
    assert written[2]["split"] == "test data"
    assert written[2]["accuracy"] == {"1": 1.0}  # each image finds itself
    assert "leave-one-out" in table(rows)


def test_evaluation_refuses_what_it_cannot_do(shards, run, tmp_path):
    options = KnnOptions(encoder=str(run), data=shards, device="cpu")
    with pytest.raises(UserError, match="200 neighbours asked for, but there are 25"):
        evaluate(options)
    with pytest.raises(UserError, match="no such encoder"):
        evaluate(replace(options, encoder=str(tmp_path)))
    unlabelled = write_images(tmp_path / "unlabelled", label=-1)
    with pytest.raises(UserError, match="26 of 26 images have no label"):
        evaluate(replace(options, data=unlabelled))
    alike = write_images(tmp_path / "alike", label=1)
    with pytest.raises(UserError, match="images of one class alone"):
        evaluate(replace(options, data=alike))


def torchrun(data: str, out: Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*start, "--standalone", "-m", "train", *command(data, out, **{"--log-steps": "1"})]


def started(shards, out, options, environment, *, until):
    """A run of two processes that has reached this checkpoint: torchrun, and its workers' pids."""
    process = subprocess.Popen(
        [*torchrun(shards, out), *options], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / f"step-{until:08d}").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    return process, [int(pid) for pid in workers]


@pytest.mark.slow
def test_two_processes_killed_go_on_exactly(shards, tmp_path):
    """SIGTERM to one, SIGKILL to all, the same command again each time, against a whole run."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    longer = ["--epochs", "3", "--checkpoint-steps", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*torchrun(shards, whole), *longer], env=environment, check=True)

    process, workers = started(shards, killed, longer, environment, until=2)
    os.kill(workers[1], signal.SIGTERM)  # rank 0 hears of it from rank 1
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's own, for whatever its workers end with
    assert re.search(r"exitcode *: 75", errors)
    assert re.search(r"stopped and saved after step \d; the same command goes on", errors)

    process, workers = started(shards, killed, longer, environment, until=6)
    # torchrun first, so that it does not tidy up; its workers have sessions of their own
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (killed / "encoder.safetensors").exists()
    assert len((killed / "metrics.jsonl").read_text().splitlines()) < 9

    subprocess.run([*torchrun(shards, killed), *longer], env=environment, check=True)
    assert len(told(killed)) == 9
    assert told(killed) == told(whole)
    first, second = (load_file(out / "encoder.safetensors") for out in (whole, killed))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_command_line_shows_one_line_and_no_traceback(tmp_path):
    arguments = command("/nowhere", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere: no dataset here")
    assert done.stderr.count("\n") == 1
