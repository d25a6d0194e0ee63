"""Run the example programs as written on a small dataset, and check what they print."""

import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from schemas import write_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dataset(make_sample, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("examples") / "d"
    samples = [make_sample(index) for index in range(40)]
    # With constant maps, all cells of one class are foreground.
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


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_plain_webdataset(dataset):
    lines = run("plain_webdataset.py", dataset)
    assert re.match(r"\(32, 3, 112, 112\) \d\d% of the cells are foreground, \[\d, ", lines[0])
    assert lines[1].startswith("(8, 3, 112, 112)")


def test_plain_webdataset_names_a_folder_without_shards(tmp_path):
    build_loader = runpy.run_path(str(ROOT / "examples/plain_webdataset.py"))["build_loader"]
    with pytest.raises(SystemExit, match=r"absent: has no shards/\*.tar"):
        build_loader(str(tmp_path / "absent"))


def test_plain_webdataset_cuts_image_and_map_alike():
    """Use images with one half that is white and salient."""
    view = runpy.run_path(str(ROOT / "examples/plain_webdataset.py"))["make_view"]
    pixels, checked = np.zeros((60, 80), np.uint8), 0
    pixels[:, 40:] = 255
    for side in ("left", "right"):
        image = Image.fromarray(pixels if side == "right" else 255 - pixels)
        sample = {"png": png(image), "saliency.png": png(image.resize((28, 28))), "cls": b"2"}
        for _ in range(20):
            crop, foreground, label = view(sample)
            assert crop.shape == (3, 112, 112)
            assert label == 2
            white = crop[0].reshape(7, 16, 7, 16).float().mean(dim=(1, 3)) > 127
            # With less white, mean - 0.6 std is below zero, and everything is foreground.
            if 0.3 < white.float().mean() < 1:
                assert (white == foreground).float().mean() > 0.8
                checked += 1
    assert checked > 5


@pytest.mark.slow
def test_questions(dataset):
    lines = run("questions.py", dataset)
    assert lines[0] == "40 images, 3 classes"
    assert lines[1] == "100.0% of the cells are foreground in b (13 images)"
    assert lines[-1] == "0 images are at least twice as wide as tall"  # they are 56 x 40


@pytest.mark.slow
def test_other_masks(dataset):
    lines = run("other_masks.py", dataset)
    assert lines == ["(32, 3, 224, 224) 75% masked", "(224, 224) 0"]
