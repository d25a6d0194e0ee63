"""MaskCo with the real trainer: micro-batches, stopped and resumed, on unlabeled COCO images."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train.trainer
from pipeline.recipes import RECIPES
from schemas import Sample, write_dataset
from tests.conftest import DATA, existing
from tests.train.runs import config, metrics, stopped_after, told
from train.encoders import build_untrained_encoder
from train.methods import MaskCoConfig

PICTURES = 24
MICRO_BATCHES = {"batch_size": 6, "grad_accum_steps": 2, "epochs": 1}


def settings_of(data: str, out: Path, **changes):
    start = dict(recipe=RECIPES["maskco"], method=MaskCoConfig(queue=20), crop_size=56, log_steps=1)
    return config(data, out, **{**start, **changes})


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder.safetensors")


def states_of(out: Path) -> list[dict[str, torch.Tensor]]:
    """Return the method's state in each checkpoint, oldest first."""
    files = sorted((out / "checkpoints").glob("*/state.pt"))
    return [torch.load(file, weights_only=True)["model"] for file in files]


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    """Train a run that is never stopped."""
    out = tmp_path_factory.mktemp("maskco")
    train.trainer.train(settings_of(shards, out, **MICRO_BATCHES))
    return out


def test_a_run_with_micro_batches_writes_its_files(run):
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    assert all(0.5 < row["regions_valid"] <= 1 for row in rows)
    start = build_untrained_encoder({"encoder": "resnet18"}, seed=0).state_dict()
    assert all(not torch.equal(value, start[n]) for n, value in trained(run).items() if "conv" in n)


@pytest.mark.slow
def test_resume_inside_an_epoch_is_exact(shards, run, tmp_path, monkeypatch):
    """Queue, its position, both branches and the head are those of a run never stopped."""
    settings = settings_of(shards, tmp_path, checkpoint_steps=2, **MICRO_BATCHES)
    with stopped_after(3, monkeypatch):
        train.trainer.train(settings)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    train.trainer.train(settings)
    assert told(tmp_path) == told(run)
    first, second = trained(run), trained(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [states_of(out)[-1] for out in (run, tmp_path)]
    for name in ("queue", "queue_next", "momentum_head.2.weight", "prediction.layers.0.weight"):
        assert torch.equal(*(state[name] for state in states)), name


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Write shards of original COCO pictures without labels, with synthetic saliency."""
    folder = existing(DATA / "coco128") / "images" / "train2017"
    random = np.random.default_rng(0)

    def samples():
        for path in sorted(folder.glob("*.jpg"))[:PICTURES]:
            width, height = Image.open(path).size
            yield Sample(
                key=path.stem,
                image=path.read_bytes(),
                extension="jpg",
                saliency=random.random((28, 28), dtype=np.float32),
                label=-1,
                height=height,
                width=width,
            )

    url = tmp_path_factory.mktemp("coco") / "shards"
    write_dataset(str(url), samples(), name="coco", shard_samples=10)
    return str(url)


@pytest.mark.slow
@pytest.mark.parametrize("head", [True, False])
def test_it_trains_on_unlabeled_coco_images(pictures, tmp_path, head):
    """Crops are so small that some pictures have no region, which the queue never gets."""
    settings = settings_of(
        pictures,
        tmp_path,
        method=MaskCoConfig(queue=1000, prediction_head=head),
        recipe=replace(RECIPES["maskco"], crop_area=(0.1, 0.3)),
    )
    train.trainer.train(settings)
    rows, (start, *_, end) = metrics(tmp_path), states_of(tmp_path)
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    valid = sum(row["regions_valid"] * 8 * 2 for row in rows)
    assert 0 < valid < PICTURES * 2 * 2
    assert end["queue_next"] == round(valid)
    assert any(name.startswith("prediction.") for name in end) is head
    moving = [name for name in end if name.endswith("conv1.weight") or "head." in name]
    assert all(not torch.equal(start[name], end[name]) for name in moving)
    assert not any(key.startswith(("prediction", "head")) for key in trained(tmp_path))
