"""Test typical mistakes of a first day: each message names the thing, the reason and the next step.

The message has at most three lines, and the command is one that a user would run.
"""

import errno
import fcntl
import importlib
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import ray
import torch

from pipeline import mounts
from precompute import ray_cluster
from schemas import UserError, write_dataset
from train.methods import MoCo

MAINS = {
    "precompute": "precompute.__main__",
    "pipeline": "pipeline.__main__",
    "train": "train.__main__",
    "evaluate": "train.evaluate.__main__",
    "schemas": "schemas.__main__",
}


@pytest.fixture(scope="module")
def place(make_sample, tmp_path_factory) -> Path:
    """Make datasets (12 images, unfinished, unlabeled, version 9) and a run."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in ("d", "unfinished", "version9", "unlabeled"):
        labeled = name != "unlabeled"
        samples = [make_sample(i) for i in range(12)]
        if not labeled:
            samples = [s.__class__(**{**vars(s), "label": -1}) for s in samples]
        classes = ["a", "b", "c"] if labeled else []
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
    # Each row has the command, then what its message must name: thing, reason, next step.
    (f"train --data {{p}}/nowhere {TRAIN}", "nowhere", "no dataset here", "saliency-precompute"),
    (f"train --data {{p}}/photos {TRAIN}", "photos", "no dataset here", "saliency-precompute"),
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
        "train --data {p}/unlabeled --out {p}/out --method supervised --device cpu",
        *("supervised", "0 classes", "DATASET=folder"),
    ),
    (f"train --data {{p}}/d {TRAIN} --config {{p}}/bad.yaml", "bad.yaml", "epoch", "epochs"),
    ("train --data {p}/d --out /proc/x --batch-size 4 --queue 8 --device cpu", "/proc/x", "", ""),
    ("evaluate knn --encoder {p}/photos --data {p}/d", "photos", "no such encoder", "training"),
    ("evaluate knn --encoder {p}/run --data {p}/unlabeled", "unlabeled", "no label", "DATASET="),
    (
        "evaluate knn --encoder {p}/run --data {p}/d",
        "--neighbors 20 200",
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
    ("schemas verify {p}/nowhere", "nowhere", "no dataset here", "saliency-precompute"),
    ("schemas verify {p}/d --shard 1", "unknown option --shard", "did you mean --shards", "--help"),
    ("schemas verfy {p}/d", "verfy", "unknown command", "did you mean verify"),
    ("train --recpie hp", "unknown option --recpie", "did you mean --recipe", "--data, --out"),
    ("evaluate knn --bogus", "unknown option --bogus", "missing --encoder, --data", "--help"),
]


def said(monkeypatch, place: Path, command: str) -> str:
    """Return a command's message for a mistake: at most three lines."""
    name, *arguments = command.replace("{p}", str(place)).split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(UserError) as error:
        importlib.import_module(MAINS[name]).main()
    message = str(error.value)
    assert len(message.splitlines()) <= 3, message
    return message


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0].replace("{p}/", ""))
def test_the_message_helps(place, tmp_path, monkeypatch, mistake):
    command, *parts = mistake
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    message = said(monkeypatch, place, command)
    for part in parts:
        assert part in message
    assert not os.listdir(tmp_path)  # nothing was started


# Mistakes in the machine's state, not in the command.

ANY = "train --data {p}/d --encoder resnet18 --crop-size 56 --batch-size 4 --queue 8 --out {p}/any"


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_driver_too_old_is_named_and_no_cpu_takes_its_place(place, monkeypatch, device):
    def refuse() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your "
            "GPU driver by downloading and installing a new version. Alternatively, ..."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    message = said(monkeypatch, place, f"{ANY} --device {device}")
    assert "driver on your system is too old (found version 12020); " in message
    assert 'choose device "cpu" (in a command: --device cpu)' in message


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0"), "GPU"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 b"),
            "this machine",
        ),
    ],
)
def test_a_full_memory(place, monkeypatch, error, where):
    def fails(self, batch):
        raise error

    monkeypatch.setattr(MoCo, "forward", fails)
    message = said(monkeypatch, place, f"{ANY} --device cpu")
    assert where in message
    assert "out of memory" in message
    assert ("2.50 GiB" in message) == (where == "GPU")
    assert "--grad-accum-steps 2" in message


def test_a_taken_port(place, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in alone.items():
            monkeypatch.setenv(name, str(value))
        message = said(monkeypatch, place, f"{ANY} --device cpu")
    assert f"127.0.0.1:{port}: the port is taken by another program; choose another" in message


def test_srun_without_torchrun(place, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    message = said(monkeypatch, place, f"{ANY} --device cpu")
    assert "srun started 8 processes that do not know of each other" in message
    assert "torchrun" in message


def test_a_file_system_without_locks(place, monkeypatch):
    def nfs(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", nfs)
    message = said(monkeypatch, place, f"{ANY} --device cpu")
    assert f"{place}/any: the file system does not support locks, as NFS" in message
    assert "--out" in message


@pytest.mark.slow
def test_shards_on_a_network_are_noted(place, tmp_path, monkeypatch, capsys):
    table = tmp_path / "mounts"
    table.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/a {place.resolve()} nfs4 rw 0 0\n")
    monkeypatch.setattr(mounts, "MOUNTS", table)
    monkeypatch.setattr(
        sys, "argv", f"{ANY} --device cpu --epochs 1".replace("{p}", str(place)).split()
    )
    importlib.import_module(MAINS["train"]).main()
    assert f"note: {place}/d lies on nfs4: if steps wait" in capsys.readouterr().out
    assert mounts.find_network_mount("/somewhere/else") is None
    assert mounts.find_network_mount("s3://bucket/data") is None


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9\n  ..."),
            ("Version mismatch", "Ray: 2.9", "start one from here", "leave --address out"),
        ),
        (ConnectionError("Could not find any running Ray instance."), ("no Ray cluster answers",)),
    ],
)
def test_ray_that_runs_elsewhere(place, tmp_path, monkeypatch, error, parts):
    def refuse(**_: object) -> None:
        raise error

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # other tests of this process may share a Ray, which the end of this job would stop, and `auto`
    # could find that of another process
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_cluster, "check_reachable", lambda _: None)
    command = "precompute --dataset folder --estimator spectral --address auto"
    message = said(monkeypatch, place, f"{command} --root {tmp_path}/photos --out {tmp_path}/o")
    for part in ("auto", *parts):
        assert part in message
