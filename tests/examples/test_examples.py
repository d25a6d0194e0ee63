"""The example programs run as written, on a small dataset, and say what is true of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from schemas import write_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(make_sample, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("examples") / "d"
    samples = [make_sample(index) for index in range(40)]
    # all of one class is foreground: constant maps
    flat = np.ones((28, 28), np.float32)
    samples = [
        sample.__class__(**{**vars(sample), "saliency": flat}) if sample.label == 1 else sample
        for sample in samples
    ]
    write_dataset(str(folder), samples, name="t", classes=["a", "b", "c"], shard_samples=20)
    return str(folder)


def run(name: str, dataset: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, dataset],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_plain_webdataset(dataset):
    lines = run("plain_webdataset.py", dataset)
    assert lines[0].startswith("(32, 3, 112, 112) (32, 28, 28) [")
    assert lines[1].startswith("(8, 3, 112, 112)")


def test_questions(dataset):
    lines = run("questions.py", dataset)
    assert lines[0] == "40 images, 3 classes"
    assert lines[1] == "100.0% of the cells are foreground in b (13 images)"
    assert lines[-1] == "0 images are at least twice as wide as high"  # they are 56 x 40


@pytest.mark.slow
def test_other_masks(dataset):
    lines = run("other_masks.py", dataset)
    assert lines == ["(32, 3, 224, 224) 75% masked", "(224, 224) 0"]
