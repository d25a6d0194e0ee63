"""Run the commands and the Python of README and docs on a few small pictures.

A block that is not run is preceded by a comment with the reason: `<!-- not run by a test: ... -->`.
Every other block runs as written; additional options only make it smaller.
"""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from ray import cloudpickle

from pipeline import fills, masks
from schemas import write_dataset
from tests.conftest import encode, noise
from train.encoders import build_encoder, save_encoder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run by a test: ([^>]+) -->\n+)?```(sh|python|console)\n(.*?)```", re.S
)

SMALL_TRAINING = (
    "--encoder resnet18 --crop-size 56 --batch-size 4 --epochs 1 --device cpu --precision fp32"
)
SMALL = {
    "precompute": "--estimator spectral",
    "train": SMALL_TRAINING,
    "train.evaluate knn": "--neighbors 1 --device cpu",
    "train.evaluate linear": "--epochs 1 --batch-size 4 --device cpu",
    "pipeline preview": "--samples 2 --crop-size 56",
}
"""Additional options of a command; an option that the page gives itself is not replaced."""
COMMANDS = {
    "saliency-shards": "schemas",
    "saliency-precompute": "precompute",
    "saliency-pipeline": "pipeline",
    "saliency-train": "train",
    "saliency-evaluate": "train.evaluate",
    "saliency-report": "train.report",
}
"""The module that an installed command runs."""
VARIABLES = {
    "precompute": {"ESTIMATOR": "spectral"},
    "pretrain": {"ARGS": f"{SMALL_TRAINING} --queue 8"},
    "evaluate": {"ARGS": "--neighbors 1 --device cpu"},
    "preview": {"ARGS": "--samples 2 --crop-size 56"},
}
"""Variables of a make target, where its command does not give them."""
SMALLER = {'device="cuda"': 'device="cpu"', "batch_size=256": "batch_size=4"}
"""Replacements in the Python of a page that make it smaller."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (reason why it is not run or "", language, text) of each block of a page, in order."""
    return [(reason, kind, text) for reason, kind, text in BLOCK.findall(page.read_text())]


@pytest.fixture
def home(make_sample, tmp_path, monkeypatch) -> Path:
    """Make a user's folder: the checkout, photos, shards of some of them, and an encoder."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.prefix) / "bin")
    (tmp_path / ".venv/.ready").touch()
    for index in range(36):  # the examples need this many for a batch
        photo = tmp_path / "photos" / "ab"[index % 2] / f"{index}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(encode(noise(index, 80, 96)))
    samples = [make_sample(index) for index in range(10)]
    for name in ("shards", "TRAIN", "VAL"):
        write_dataset(str(tmp_path / name), samples, name=name, classes=["a", "b", "c"])
    metadata = {
        "encoder": "resnet18", "method": "moco", "recipe": "hp", "crop_size": "56", "seed": "0",
        "high_pass": "False", "high_pass_kernel": "11", "high_pass_sigma": "5.0",
    }  # fmt: skip
    (tmp_path / "encoder").mkdir()
    save_encoder(tmp_path / "encoder/encoder.safetensors", build_encoder("resnet18")[0], metadata)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def prepare(home: Path, page: str) -> None:
    """Prepare what a page of docs takes for granted; its first Python block becomes mine.py."""
    if page != "README.md":
        (home / "out").mkdir()
        (home / "out/photos").symlink_to(home / "shards")
        if page != "train.md":
            (home / "out/run").symlink_to(home / "encoder")
    lines = [f"photos/{'ab'[index % 2]}/{index}.jpg,{'ab'[index % 2]}" for index in range(10)]
    (home / "list.csv").write_text("\n".join(lines))
    code = [text for _, kind, text in blocks(ROOT / "docs" / page) if kind == "python"]
    (home / "mine.py").write_text(code[0] if code else "")
    # Pickle by value: the workers of a running Ray cannot import this module.
    cloudpickle.register_pickle_by_value(importlib.import_module("mine"))


def typed(command: str, small: bool = False) -> None:
    """Run one shell line in this process, so that imports, which take seconds, happen only once."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        for line in expanded(words):
            typed(line, small=True)
        return
    if words[0] in COMMANDS:
        words = ["python", "-m", COMMANDS[words[0]], *words[1:]]
    assert words[0].endswith("python"), command
    if words[1].endswith(".py"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        return
    assert words[1] == "-m", command
    module, arguments = words[2], words[3:]
    name = f"{module} {arguments[0]}" if f"{module} {arguments[0]}" in SMALL else module
    package = module if module == "train.report" else f"{module}.__main__"
    with pytest.MonkeyPatch.context() as patch:
        more = [] if small else further(shlex.split(SMALL.get(name, "")), arguments)
        patch.setattr(sys, "argv", [module, *arguments, *more])
        patch.setattr("train.trainer.LOCK_SECONDS", 1)
        assert importlib.import_module(package).main() in (None, 0), command


def further(options: list[str], given: list[str]) -> list[str]:
    """Return the `--name value ...` options without those that are given already."""
    starts = [place for place, word in enumerate(options) if word.startswith("--")]
    pairs = [options[start:end] for start, end in pairwise([*starts, len(options)])]
    return [word for pair in pairs if pair[0] not in given for word in pair]


def execute(code: str, home: Path) -> None:
    """Run the Python of a page, where `url` is the URL of a dataset."""
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    exec(code, {"url": str(home / "shards")})


def expanded(words: list[str]) -> list[str]:
    """Return the commands that make would run."""
    # Leave out the variables of the make that runs the tests.
    own = {name: x for name, x in os.environ.items() if name != "ARGS" and "MAKE" not in name}
    environment = own | VARIABLES.get(words[1], {})
    done = subprocess.run(
        [*words[:1], "-n", *words[1:]], capture_output=True, text=True, check=True, env=environment
    )
    found = [line for line in done.stdout.replace("\\\n", " ").splitlines() if " -m " in line]
    assert found, done.stdout
    return found


PAGES_THAT_RUN = [
    page for page in PAGES if any(not reason and kind == "sh" for reason, kind, _ in blocks(page))
]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.name)
def test_a_page_does_what_it_says(home, monkeypatch, page):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr("pipeline.fills.FILLS", dict(fills.FILLS))
    monkeypatch.setattr("pipeline.masks.MASKS", dict(masks.MASKS))
    own = page.parent.name == "docs"
    if own:
        prepare(home, page.name)
    for reason, kind, text in blocks(page):
        if reason:
            continue
        assert kind != "console", "a session is either typed by a test too, or says why not"
        if kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                typed(line)
        elif own:
            own = False  # the first block is mine.py
        else:
            execute(text, home)


def test_every_installed_command_is_known_here():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert COMMANDS.keys() == scripts.keys()


def test_further_options_do_not_repeat_those_of_the_page():
    assert further(["--a", "1", "--b", "2", "3"], ["--a", "9"]) == ["--b", "2", "3"]
    assert further([], ["--a"]) == []


def test_most_blocks_run():
    reasons = [reason for page in PAGES for reason, kind, _ in blocks(page)]
    assert reasons.count("") > len(reasons) / 2
