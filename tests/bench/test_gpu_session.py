"""Test the command of the first GPU session, in its small version on a CPU."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import ResNet

from bench import compiled_step, gpu_loader, gpu_session, gpu_train, process
from bench.fed_step import FedStep
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
    installed = process.is_installed
    absent = ("tyro", "safetensors", "pydantic", "ray")
    monkeypatch.setattr(
        process, "is_installed", lambda name: name not in absent and installed(name)
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


def test_each_line_is_printed_before_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A session may be cut off at any time: what it has measured must be on the terminal."""
    printed = []

    def read(*_: object) -> FedStep:
        printed.append(capsys.readouterr().out)
        return FedStep(1.0, 1.0, 1.0, 1.0, 0, 1)

    def stop(*_: object) -> tuple[float, float]:
        printed.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_train, "time_steps", lambda *_: 10.0)
    monkeypatch.setattr(gpu_train, "measure_fed_step", read)
    monkeypatch.setattr(gpu_train, "time_loader", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu_session.check_step(tmp_path, "cpu", None)
    first, second = printed
    assert first == "batch 4: 10.0 ms per step alone, 10.0 ms fed, alone/fed 1.000, 400 images/s\n"
    assert second.startswith("batch 4: a fed step is 1.0 ms")


def test_a_wait_of_the_host_fails_after_all_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Views:
        def __iter__(self) -> Iterator[int]:
            return iter([1])

        def close(self) -> None:
            pass

    config = SimpleNamespace(recipe=None)
    monkeypatch.setattr(gpu_train, "build", lambda *_: (None, config))
    monkeypatch.setattr(gpu_train, "SyntheticViews", lambda *_: [])
    monkeypatch.setattr(gpu_train, "MaskedViews", lambda *_, **__: Views())
    monkeypatch.setattr(gpu_train, "reset_memory", lambda *_: None)
    monkeypatch.setattr(gpu_train, "format_peak_memory", lambda *_: "")
    monkeypatch.setattr(gpu_train, "time_steps", lambda *_: 10.0)
    monkeypatch.setattr(gpu_train, "measure_fed_step", lambda *_: FedStep(1, 1, 1, 1, 0, 1))
    monkeypatch.setattr(gpu_train, "time_on_urgent_stream", lambda *_: "urgent")
    monkeypatch.setattr(gpu_train, "compare_decoders", lambda *_: iter(["decoders"]))
    monkeypatch.setattr(gpu_train, "time_loader", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(gpu_train, "count_waits", lambda *_: ["x.py:1", "x.py:1"])
    monkeypatch.setattr(gpu_train, "profile_kernels", lambda *_: iter(["kernels"]))
    lines = gpu_train.measure("", torch.device("cuda"), gpu_train.Settings(batch_sizes=(4,)))
    printed: list[str] = []
    with pytest.raises(AssertionError, match=r"^batch 4: the host waits: x\.py:1$"):
        printed.extend(lines)
    assert printed[2:] == [
        "batch 4: urgent", "decoders",
        "batch 4: 1.0 ms per batch of the loader alone; 1.0 of them the host spends in the call",
        "batch 4: 2 waits of the host in a fed step", "kernels",
    ]  # fmt: skip


def test_a_machine_that_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_step, "find_compile_obstacle", lambda _: "no C compiler")
    lines = compiled_step.measure("", torch.device("cuda"), gpu_train.Settings())
    with pytest.raises(AssertionError, match="PyTorch cannot compile: no C compiler"):
        next(lines)


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
