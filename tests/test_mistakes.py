"""Twenty mistakes of a first day: each message names the thing, the reason and the next step.

In at most three lines, by the command that a user would give.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from schemas import UserError, write_dataset

MAINS = {
    "precompute": "precompute.__main__",
    "pipeline": "pipeline.__main__",
    "train": "train.__main__",
    "evaluate": "train.evaluate.__main__",
    "schemas": "schemas.__main__",
}


@pytest.fixture(scope="module")
def place(make_sample, tmp_path_factory) -> Path:
    """A dataset of 12 images, an unfinished one, an unlabelled one, one of version 9, a run."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("d", "unfinished", "version9", "unlabelled"):
        labelled = name != "unlabelled"
        samples = [make_sample(i) for i in range(12)]
        if not labelled:
            samples = [s.__class__(**{**vars(s), "label": -1}) for s in samples]
        classes = ["a", "b", "c"] if labelled else []
        write_dataset(str(root / name), samples, name="t", classes=classes)
    (root / "unfinished" / "dataset.json").unlink()
    card = root / "version9" / "dataset.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "format_version": 9}))
    (root / "photos").mkdir()
    (root / "bad.yaml").write_text("epoch: 3\n")
    from train.encoders import build_encoder, save_encoder

    (root / "run").mkdir()
    metadata = {
        "encoder": "resnet18", "crop_size": "56", "high_pass": "False", "high_pass_kernel": "11",
        "high_pass_sigma": "5.0", "seed": "0",
    }  # fmt: skip
    save_encoder(root / "run" / "encoder.safetensors", build_encoder("resnet18")[0], metadata)
    return root


TRAIN = "--encoder resnet18 --crop-size 56 --batch-size 4 --queue 8 --device cpu --out {p}/out"

MISTAKES = [
    # the command, then what its message must name: thing, reason, next step
    (f"train --data {{p}}/nowhere {TRAIN}", "nowhere", "no dataset here", "make precompute"),
    (f"train --data {{p}}/photos {TRAIN}", "photos", "no dataset here", "make precompute"),
    (f"train --data {{p}}/unfinished {TRAIN}", "unfinished", "not finished", "same precompute"),
    (f"train --data {{p}}/version9 {TRAIN}", "dataset.json", "version 9", "1"),
    (
        f"train --data {{p}}/d {TRAIN} --batch-size 64 --queue 64",
        "12 samples",
        "too few",
        "smaller",
    ),
    (f"train --data {{p}}/d {TRAIN} --queue 2", "queue 2", "smaller than the batch", "--queue"),
    (f"train --data {{p}}/d {TRAIN} --recipe hpp", "hpp", "unknown recipe", "did you mean hp"),
    (f"train --data {{p}}/d {TRAIN} --method moko", "moko", "unknown method", "did you mean moco"),
    (f"train --data {{p}}/d {TRAIN} --encoder resnet19", "resnet19", "unknown", "resnet1"),
    (f"train --data {{p}}/d {TRAIN} --crop-size 60", "crop_size is 60", "multiple", "7"),
    (f"train --data {{p}}/d {TRAIN} --device cuda", "cuda", "no GPU", "--device cpu"),
    (
        "train --data {p}/unlabelled --out {p}/out --method supervised --device cpu",
        *("supervised", "0 classes", "DATASET=folder"),
    ),
    (f"train --data {{p}}/d {TRAIN} --config {{p}}/bad.yaml", "bad.yaml", "epoch", "epochs"),
    ("train --data {p}/d --out /proc/x --batch-size 4 --queue 8 --device cpu", "/proc/x", "", ""),
    ("evaluate knn --encoder {p}/photos --data {p}/d", "photos", "no such encoder", "training"),
    ("evaluate knn --encoder {p}/run --data {p}/unlabelled", "unlabelled", "no label", "DATASET="),
    (
        "evaluate knn --encoder {p}/run --data {p}/d",
        "--neighbours 20 200",
        "between 1 and 11",
        "images",
    ),
    ("evaluate linaer --encoder {p}/run", "linaer", "unknown command", "did you mean linear"),
    (
        "precompute --dataset imagnet --root {p}/photos --out {p}/o",
        "imagnet",
        "unknown",
        "mean imagenet",
    ),
    ("precompute --dataset folder --root {p}/photos --out {p}/o", "photos", "no ", "ROOT"),
    ("precompute --dataset folder --root {p} --out {p}/o", "/o", "lies inside", "inputs"),
    ("pipeline preview --data {p}/d --recipe.fill nose", "nose", "unknown fill", "did you mean no"),
    ("schemas verify {p}/nowhere", "nowhere", "no dataset here", "make precompute"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0].replace("{p}/", ""))
def test_the_message_helps(place, tmp_path, monkeypatch, mistake):
    command, *parts = mistake
    name, *arguments = command.replace("{p}", str(place)).split()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        importlib.import_module(MAINS[name]).main()
    message = str(error.value)
    assert len(message.splitlines()) <= 3, message
    for part in parts:
        assert part in message
    assert not os.listdir(tmp_path)  # nothing was begun
