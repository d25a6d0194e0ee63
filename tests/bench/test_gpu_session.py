"""Test the command of the first GPU session, in its small version on a CPU."""

from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet

from bench import compiled_step, gpu_loader, gpu_session, gpu_train
from bench.gpu_session import FAIL, PASS, SKIP, Report
from train.training_step import TrainingStep


def test_verdicts_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> str:
        raise AssertionError("2 waits")

    def crash() -> str:
        raise RuntimeError("CUDA error")

    report = Report()
    report.run("fine", lambda: "3 batches", ())
    report.run("wrong", fail, ())
    report.run("broken", crash, ())
    report.run("absent", lambda: "never run", ("torch", "no_such_package", "no.such_one"))
    report.run("needs a GPU", lambda: None, ())
    assert report.verdicts == {
        "fine": PASS, "wrong": FAIL, "broken": FAIL, "absent": SKIP, "needs a GPU": SKIP,
    }  # fmt: skip
    assert report.summarize() == "PASS 1, FAIL 2 (wrong, broken), SKIP 2 (absent, needs a GPU)"
    printed = capsys.readouterr().out
    assert "PASS fine: 3 batches (0 s)" in printed
    assert "FAIL wrong: 2 waits" in printed
    assert "FAIL broken: RuntimeError: CUDA error" in printed
    assert "SKIP absent: not installed here: no_such_package, no.such_one" in printed


@pytest.mark.slow
def test_the_loader_needs_no_command_line_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = gpu_session.is_installed
    absent = ("tyro", "safetensors", "pydantic", "ray")
    monkeypatch.setattr(
        gpu_session, "is_installed", lambda name: name not in absent and installed(name)
    )
    assert gpu_session.main(["--parts", "loader", "step"]) == 0
    printed = capsys.readouterr().out
    assert "SKIP step: not installed here: tyro, safetensors" in printed
    waits = 0 if torch.cuda.is_available() else 1
    passed = 1 + len(gpu_loader.CHECKS) - waits  # and the environment
    assert f"PASS {passed}, FAIL 0, SKIP {1 + waits}" in printed
    for name in set(gpu_loader.CHECKS) - {"no waits"}:
        assert f"PASS loader {name}: " in printed


@pytest.mark.slow
def test_the_step_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_session.main(["--parts", "step"]) == 0
    printed = capsys.readouterr().out
    assert "ms per step alone" in printed
    assert "the 15 most expensive of" in printed
    assert printed.splitlines()[-1] == "PASS 2, FAIL 0, SKIP 0"


def test_the_compiled_step_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("compiling takes minutes")
    assert gpu_session.main(["--parts", "compiled"]) == 0
    assert "SKIP compiled: there is no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_is_timed_with_compiled_encoders(tmp_path: Path) -> None:
    """On a CPU PyTorch traces the encoders, but does not generate code for them."""
    url = gpu_loader.write_photos(tmp_path, 8, formats=("JPEG",))
    compiled = []

    def compile_(step: TrainingStep) -> None:
        compiled.append(step)
        compiled_step.compile_encoders_(step, backend="eager")

    cpu, settings = torch.device("cpu"), gpu_train.Settings.small()
    times = compiled_step.time_compiled(url, 4, cpu, settings, compile_)
    assert min(times) > 0
    encoders = [module for module in compiled[0].method.modules() if isinstance(module, ResNet)]
    assert len(encoders) == 2  # and the momentum encoder
    assert all(encoder._compiled_call_impl is not None for encoder in encoders)
