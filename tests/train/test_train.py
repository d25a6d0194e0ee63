"""The whole job on real shards, in this process: it runs, refuses and resumes."""

import json
import math
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import ResNet

import train.trainer
from pipeline import RECIPES
from schemas import ShardDataset, UserError
from schemas.cli import TerminatedError
from tests.train.runs import (
    StopError,
    config,
    metrics,
    scores,
    stopped_after,
    told,
    write_images,
)
from train.config import TrainConfig
from train.encoders import build_encoder, build_untrained_encoder, load_encoder, save_encoder
from train.features import build_eval_recipe, extract_features, remove_masks
from train.knn import compute_knn_accuracy
from train.methods import MoCo, MoCoConfig, Setup, SimCLRConfig, SupervisedConfig
from train.optim import OptimConfig
from train.presets import SUPERVISED_VIEWS


def test_a_run_writes_its_files(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert rows[0]["lr"] == pytest.approx(0.03 * 8 / 256)
    assert all(row["images_per_second"] > 0 and row["data_wait"] >= 0 for row in rows)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["method"] == {"name": "moco", "queue": 20, **written["method"]}
    decided = written["decided"]
    assert decided["crop_size"] == 28
    assert decided["precision"] in ("bf16", "fp32")
    assert decided["lr"] == rows[0]["lr"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000003",
        "step-00000006",
    ]
    assert list((run / "tensorboard").iterdir())
    for epoch in (1, 2):
        with Image.open(run / "views" / f"epoch-{epoch:04d}.png") as sheet:
            assert min(sheet.size) > 600  # three views of four images
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[0])
    assert start["after_step"] == 0
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "git" in start


def test_knn_of_each_epoch_is_that_of_the_encoder(shards, run):
    """Compute the last accuracy again from the exported file."""
    rows = scores(run)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    settings = config(shards, run)
    encoder, _, _ = load_encoder(str(run))
    recipe = remove_masks(replace(settings.recipe, crop_size=28))
    found = extract_features(encoder, recipe, shards, torch.device("cpu"), 7, "fp32")
    accuracy = compute_knn_accuracy(found, None, classes=2, neighbors=(1, 5))
    assert rows[-1]["knn_1"] == pytest.approx(accuracy[1])
    assert rows[-1]["knn_5"] == pytest.approx(accuracy[5])


def test_encoder_is_torchvisions_and_was_trained(run):
    tensors = load_file(run / "encoder.safetensors")
    theirs = torchvision.models.resnet18().state_dict()
    assert set(tensors) == {key for key in theirs if not key.startswith("fc.")}
    encoder, metadata, _ = load_encoder(str(run))
    assert metadata["recipe"] == "hp"
    assert metadata["high_pass"] == "True"
    assert metadata["crop_size"] == "28"
    start = build_untrained_encoder({"encoder": "resnet18"}, seed=0)
    assert not torch.equal(encoder.conv1.weight, start.conv1.weight)
    assert encoder.bn1.num_batches_tracked == 6


@pytest.mark.slow
def test_resume_inside_an_epoch_is_exact(shards, run, tmp_path, monkeypatch):
    """Stop after step 5, one step after the last checkpoint, inside the second epoch."""

    settings = config(shards, tmp_path, checkpoint_steps=2, log_steps=1)
    with stopped_after(5, monkeypatch):
        train.trainer.train(settings)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    train.trainer.train(settings)
    assert told(tmp_path) == told(run)
    first, second = (load_file(out / "encoder.safetensors") for out in (run, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_the_global_batch_may_change_where_an_epoch_ended(shards, tmp_path, capsys):
    """Train one epoch of three steps, then two of six and one of three; views are by epoch."""
    settings = config(shards, tmp_path / "run", epochs=4, log_steps=1, recipe=RECIPES["none"])
    half = replace(settings, batch_size=4)

    def stopping(after: int):
        def evaluation(method, epoch):
            if epoch == after:
                raise StopError
            return {"top1": epoch / 10}

        return evaluation

    for own, after in ((settings, 1), (half, 3)):
        with pytest.raises(StopError):
            train.trainer.train(own, stopping(after))
    assert "resumes after step 6 of 24, batch 8 -> 4" in capsys.readouterr().out
    train.trainer.train(settings, stopping(0))
    assert "resumes after step 9 of 12, batch 4 -> 8" in capsys.readouterr().out
    steps = [(row["epoch"], row["step"]) for row in metrics(tmp_path / "run")]
    numbers = [*range(1, 4), *range(7, 19), *range(10, 13)]
    assert steps == list(zip(np.repeat([1, 2, 3, 4], [3, 6, 6, 3]), numbers, strict=True))
    assert [row["epoch"] for row in scores(tmp_path / "run")] == [1, 2, 3, 4]
    rates = [row["lr"] for row in metrics(tmp_path / "run")]
    whole = cosine_rates(settings, 12)
    assert rates[:3] == pytest.approx(whole[:3])
    assert rates[3:15] == pytest.approx(cosine_rates(half, 24)[6:18])
    assert rates[15:] == pytest.approx(whole[9:])


def cosine_rates(settings: TrainConfig, total: int) -> list[float]:
    """Return the cosine schedule of a run that keeps its batch, from its definition."""
    peak = 0.03 * settings.batch_size / 256
    return [peak * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_epoch_and_is_caught_up(shards, tmp_path):
    def fails(method, epoch):
        raise OSError("gone")

    settings = config(shards, tmp_path)
    with pytest.raises(OSError, match="gone"):
        train.trainer.train(settings, fails)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    seen = []

    def evaluation(method, epoch):
        seen.append(epoch)
        return {"top1": epoch / 10}

    train.trainer.train(settings, evaluation)
    train.trainer.train(settings, evaluation)
    assert seen == [1, 2]
    assert [(row["step"], row["top1"]) for row in scores(tmp_path)] == [(3, 0.1), (6, 0.2)]


@pytest.mark.slow
def test_remains_of_a_killed_save_are_removed(shards, tmp_path):
    for name in (".step-00000001.tmp", ".step-00000002.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.pt").write_bytes(b"half")
    train.trainer.train(config(shards, tmp_path, epochs=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_at_once_and_resume_is_exact(shards, run, tmp_path, monkeypatch, number):
    """It saves with the next step, in the middle of an epoch, where no checkpoint was due."""
    add = train.trainer.MetricsBuffer.add

    def interrupted(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == 1:
            os.kill(os.getpid(), number)

    settings = config(shards, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train.trainer.MetricsBuffer, "add", interrupted)
        with pytest.raises(TerminatedError, match="stopped and saved after step 2; run the") as up:
            train.trainer.train(settings)
    assert up.value.status == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train.trainer.train(settings)
    assert told(tmp_path) == told(run)
    first, second = (load_file(out / "encoder.safetensors") for out in (run, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_is_not_changed(shards, run, capsys):
    before, encoder = told(run), (run / "encoder.safetensors").read_bytes()
    train.trainer.train(config(shards, run))
    assert told(run) == before
    assert (run / "encoder.safetensors").read_bytes() == encoder  # a probe of it can resume
    assert "resumes after step 6 of 6" in capsys.readouterr().out


def test_other_settings_and_resume_never_are_refused(shards, run):
    with pytest.raises(UserError, match=r"method\.rho was 2\.0, is 3\.0"):
        train.trainer.train(config(shards, run, method=MoCoConfig(queue=20, rho=3.0)))
    with pytest.raises(UserError, match="holds the checkpoints of a run; choose another --out"):
        train.trainer.train(config(shards, run, resume="never"))


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_before_its_update(shards, tmp_path):
    """It leaves the keys, the views and the state that reproduce the loss."""
    explodes = config(shards, tmp_path, optim=OptimConfig(lr=1e30), log_steps=1)
    with pytest.raises(UserError, match=r"the loss of step [2-4] is (nan|inf)") as error:
        train.trainer.train(explodes)
    steps = [row["step"] for row in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    (folder,) = (tmp_path / "failed").iterdir()
    assert str(folder) in str(error.value)
    assert str(error.value).count("\n") <= 2
    state = torch.load(folder / "state.pt", weights_only=True)
    own = torch.load(folder / "rank-0000.pt", weights_only=True)
    assert (state["step"], state["after_step"]) == (len(steps) + 1, len(steps))
    assert len(set(own["keys"])) == 8
    assert all(key.startswith("image") for key in own["keys"])
    method = explodes.method.build(
        Setup(encoder="resnet18", batch_size=8, classes=2, seed=0)
    ).train()
    method.load_state_dict(state["model"])
    method.begin_step()
    loss = method(SimpleNamespace(**own["views"]))["loss"]
    assert not torch.isfinite(loss)


@pytest.mark.slow
def test_loss_that_was_not_finite_earlier_is_named_by_its_own_step(shards, tmp_path):
    with pytest.raises(UserError, match=r"(?s)step [23] is .*--log-steps 1 stops right at"):
        train.trainer.train(config(shards, tmp_path, optim=OptimConfig(lr=1e30), log_steps=100))
    (folder,) = (tmp_path / "failed").iterdir()
    own = torch.load(folder / "rank-0000.pt", weights_only=True)
    assert own["views"] is None
    assert len(own["keys"]) == 8


def test_a_loss_is_named_even_if_its_state_cannot_be_written(shards, tmp_path):
    (tmp_path / "failed").touch()  # a file where the folder would be
    with pytest.raises(
        UserError, match=r"step [2-4] is (nan|inf); its state could not .*directory"
    ):
        train.trainer.train(config(shards, tmp_path, optim=OptimConfig(lr=1e30), log_steps=1))


def test_two_runs_do_not_share_a_folder(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train.trainer, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another run is writ"):
        train.trainer.train(config(shards, tmp_path))


@pytest.mark.slow
def test_supervised_reads_queries_and_labels(shards, tmp_path):
    settings = config(
        shards, tmp_path, method=SupervisedConfig(), stem="small", optim=OptimConfig(base_lr=0.1)
    )
    settings = replace(settings, crop_size=14)  # the small stem does not shrink it
    views = {**SUPERVISED_VIEWS, "crop_area": (0.9, 1.0)}
    train.trainer.train(replace(settings, recipe=replace(settings.recipe, **views), epochs=8))
    rows = metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    encoder, metadata, _ = load_encoder(str(tmp_path))
    assert metadata["stem"] == "small"
    assert encoder.conv1.weight.shape == (64, 3, 3, 3)
    unlabeled = write_images(tmp_path / "unlabeled", label=-1, classes=())
    some = write_images(tmp_path / "some", label=-1)
    with pytest.raises(UserError, match="26"):
        train.trainer.train(replace(settings, data=some, out=str(tmp_path / "other")))
    with pytest.raises(UserError, match="have 0 classes; it needs labels"):
        train.trainer.train(replace(settings, data=unlabeled, out=str(tmp_path / "other")))


def test_small_stem_keeps_the_resolution_and_survives_the_file(tmp_path):
    encoder, width = build_encoder("resnet18", "small")
    maps = []
    encoder.layer1.register_forward_hook(lambda module, x, y: maps.append(y.shape))
    encoder(torch.randn(2, 3, 32, 32))
    assert maps == [(2, 64, 32, 32)]
    assert width == 512
    save_encoder(
        tmp_path / "encoder.safetensors", encoder, {"encoder": "resnet18", "stem": "small"}
    )
    again, _, _ = load_encoder(str(tmp_path))
    assert torch.equal(again.conv1.weight, encoder.conv1.weight)


@pytest.mark.slow
def test_cifars_own_size_trains_with_the_small_stem(shards, tmp_path):
    """7 does not divide 32, which does not matter without masks."""
    method = SimCLRConfig(projection=8)
    settings = config(shards, tmp_path, method=method, stem="small", crop_size=32, epochs=1)
    train.trainer.train(replace(settings, recipe=RECIPES["none"]))
    assert len(metrics(tmp_path)) == 3
    metadata = load_encoder(str(tmp_path))[1]
    assert (metadata["crop_size"], build_eval_recipe(metadata).crop_size) == ("32", 32)


@pytest.mark.slow
def test_synthetic_trains_without_data_and_resumes(tmp_path):
    settings = config("", tmp_path, synthetic=20, compile=False)
    train.trainer.train(settings)
    assert [row["epoch"] for row in metrics(tmp_path)] == [1, 1, 2, 2]
    train.trainer.train(settings)


@pytest.mark.slow
def test_compile_is_for_the_encoders(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(ResNet, "compile", lambda self: compiled.append(self))  # noqa: PLW0108
    train.trainer.train(config("", tmp_path, synthetic=8, epochs=1, compile=True))
    assert len(compiled) == 2  # the momentum branch is compiled too


@pytest.mark.slow
def test_weights_and_biases_gets_each_step_if_installed(shards, tmp_path, monkeypatch):
    logged, ids = [], []

    def init(**options):
        ids.append(options["id"])
        return SimpleNamespace(log=lambda row, step: logged.append(step), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = config(shards, tmp_path, wandb="project", epochs=1)
    train.trainer.train(settings)
    assert logged == [1, 2, 3]
    train.trainer.train(settings)
    assert ids[0] == ids[1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        train.trainer.train(config(shards, tmp_path / "other", wandb="project"))


def test_a_methods_warning_is_printed_once_and_at_the_end(shards, tmp_path, monkeypatch, capsys):
    logged = []

    def warnings(self, scalars):
        logged.append(scalars["step"])
        return ["it is cold"]

    monkeypatch.setattr(MoCo, "warnings", warnings)
    train.trainer.train(config(shards, tmp_path / "run", epochs=3))
    assert logged == [3, 6, 9]
    text = capsys.readouterr().out
    assert text.count("warning: it is cold") == 2
    assert text.index("warning") < text.index("step 4/9") < text.rindex("warning")


@pytest.mark.parametrize("method", [MoCoConfig(queue=20), SimCLRConfig()])
def test_a_method_without_labels_does_not_read_them(shards, tmp_path, monkeypatch, method):
    """A dataset of over 10^8 images has them in 100,000 files, and each rank would read all."""
    reads = []
    monkeypatch.setattr(ShardDataset, "unlabeled", property(reads.append))
    train.trainer.prepare_job(config(shards, tmp_path, method=method))
    assert not reads


def test_a_full_disk_leaves_the_options_of_a_run(shards, tmp_path, monkeypatch):
    """They may be the only record of how to resume it: --config RUN/config.yaml."""
    (tmp_path / "config.yaml").write_text("seed: 3")
    full = OSError(28, "No space left on device")
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if "config.yaml" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise full
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        train.trainer.train(config(shards, tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "seed: 3"
    assert not list(tmp_path.glob("*.tmp"))
