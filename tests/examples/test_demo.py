"""Test the demo's parts: its trainings differ only in the recipe, and it prints the results.

`make demo` itself takes minutes and is not run here.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from schemas import write_dataset
from train.__main__ import parse_command_line

FILE = Path(__file__).resolve().parents[2] / "examples/demo.py"


@pytest.fixture
def demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("demo_of_a_test", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def result(weights: str, accuracy: float) -> dict:
    return {"weights": weights, "accuracy": {"200": accuracy}}


@pytest.fixture
def finished(demo, make_sample, tmp_path: Path) -> Path:
    """Make the folder of a finished demo; the plain encoder's first evaluation is outdated."""
    samples = [make_sample(index) for index in range(3)]
    write_dataset(str(tmp_path / "test"), samples, name="t", classes=["a", "b", "c"])
    write_lines(
        tmp_path / "plain/results.jsonl",
        [result("trained", 0.1), result("trained", 0.5), result("untrained", 0.3)],
    )
    write_lines(
        tmp_path / "high-pass/results.jsonl", [result("trained", 0.7), result("untrained", 0.4)]
    )
    write_lines(tmp_path / "masked/results.jsonl", [result("trained", 0.8)])
    write_lines(
        tmp_path / "masked/metrics.jsonl",
        [{"step": 10, "loss": 6.0}, {"step": 250, "loss": 5.0}, {"epoch": 10, "knn_20": 0.8}],
    )
    return tmp_path


def test_the_trainings_differ_in_the_recipe_alone(demo, tmp_path):
    arguments = [
        [str(word) for word in demo.train_arguments(tmp_path, arm, 3, 7)] for arm in demo.ARMS
    ]
    plain, filtered, masked = (parse_command_line(words) for words in arguments)
    assert plain.recipe.fill == filtered.recipe.fill == "none"
    assert masked.recipe.fill == "noise"
    assert replace(filtered.recipe, high_pass=False) == plain.recipe
    for other in (filtered, masked):
        assert plain.out != other.out
        assert replace(other, recipe=plain.recipe, out=plain.out) == plain
    assert (plain.epochs, plain.seed) == (3, 7)


def test_the_report_has_the_latest_accuracies(demo, finished):
    rows = {row.name: row.accuracy for row in demo.collect_rows(finished)}
    assert list(rows.values()) == [0.4, 0.5, 0.7, 0.8]
    text = demo.report(finished, 12.0)
    for line in ("untrained encoder", "MoCo v2 ", "MoCo v2, high-pass ", "high-pass, masked"):
        assert line in text
    assert "40.0%" in text
    assert "80.0%" in text
    assert "250 steps" in text
    assert Image.open(finished / "demo.png").width > 600


def test_equal_results_are_equal_pictures(demo, tmp_path):
    rows = [demo.Row("a", 0.2), demo.Row("b", 0.4), demo.Row("c", 0.9), demo.Row("d", 0.7)]
    contents = []
    for name in ("one.png", "two.png"):
        demo.draw_picture(rows, tmp_path / name, 100)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    demo.draw_picture([*rows[:3], demo.Row("d", 0.5)], tmp_path / "three.png", 100)
    assert (tmp_path / "three.png").read_bytes() != contents[0]


def test_a_command_that_is_not_installed_ends_the_demo(demo, monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"saliency-train is not installed .*make setup"):
        demo.run_step("a title", "saliency-train", "--help")


def test_a_step_that_fails_ends_the_demo(demo, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    script = tmp_path / "saliency-train"
    script.write_text("#!/bin/sh\nexit 75\n")
    script.chmod(0o755)
    with pytest.raises(SystemExit) as stop:
        demo.run_step("a title", "saliency-train", "--out", "a b")
    assert stop.value.code == 75
    assert "$ saliency-train --out 'a b'" in capfd.readouterr().out
