"""Test the precompute part of the first GPU session, in its small version on a CPU."""

import ast
import multiprocessing
import queue
import re
import threading
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu_precompute
from bench.gpu_precompute import Settings, measure, run_worker
from tests.train.ranks import get_preloaded_context

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_workers_side_by_side_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the workers from a process that has imported what they need, unless they use a GPU."""
    methods: list[str] = []

    def remember(method: str) -> BaseContext:
        methods.append(method)
        if torch.cuda.is_available():
            return multiprocessing.get_context(method)
        return get_preloaded_context()

    contexts = SimpleNamespace(get_context=remember)
    monkeypatch.setattr(gpu_precompute, "multiprocessing", contexts)
    lines: list[str] = []
    problem = ""
    try:
        lines.extend(measure(Settings.small()))
    except AssertionError as error:
        problem = str(error)
    assert re.fullmatch(
        r"network alone: [1-9]\d* windows/s \(squeezenet1_1, 1 windows per image\)", lines[0]
    )
    figures = r"[1-9]\S* images/s, \d+ windows/s, \d+% of the network alone, \S+ CPU ms per image"
    assert re.fullmatch(f"1 workers: {figures}", lines[-2])
    assert re.fullmatch(f"2 workers: {figures}", lines[-1])
    # Two workers may be slower than one on a busy CPU; nothing else may have failed.
    assert not problem or problem.startswith("2 workers give")
    assert methods == ["spawn", "spawn"], "a fork cannot use the CUDA of its parent"


def test_a_worker_that_fails_says_why_and_frees_the_others(tmp_path: Path) -> None:
    """Run the worker in this process: it is a function of a barrier and a queue."""
    settings = Settings("no-such-net", 2, 1, 8, 8, workers=(2,))
    warm, reports = threading.Barrier(2), queue.Queue()
    run_worker(settings, 1, tmp_path, warm, reports)  # type: ignore[arg-type]
    assert "unknown backbone 'no-such-net'" in reports.get_nowait()
    assert warm.broken, "the other worker would wait for this one"


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_precompute, "NEEDED", ("torch", "absent_package", "absent.part"))
    with pytest.raises(AssertionError, match=r"not installed here: absent_package, absent\.part"):
        next(measure(Settings.small()))


def test_each_line_is_there_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(settings: Settings, count: int) -> tuple[float, float]:
        if count == 2:
            raise KeyboardInterrupt
        return 100.0 / count, 1.5

    monkeypatch.setattr(gpu_precompute, "measure_network", lambda *args, **options: 1000.0)
    monkeypatch.setattr(gpu_precompute, "run_workers", stop)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        lines.extend(measure(Settings(workers=(1, 2))))
    assert lines[-1] == (
        "1 workers: 100.0 images/s, 900 windows/s, 90% of the network alone, 1.50 CPU ms per image"
    )


def test_workers_that_fail_or_slow_each_other_down_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings, count: int) -> tuple[float, float]:
        if count == 2:
            raise RuntimeError("out of memory")
        return 100.0 / count, 1.5

    monkeypatch.setattr(gpu_precompute, "measure_network", lambda *args, **options: 1000.0)
    monkeypatch.setattr(gpu_precompute, "run_workers", fail)
    message = r"2 workers: out of memory; 3 workers give 33\.3 images/s, fewer gave 100\.0"
    with pytest.raises(AssertionError, match=message):
        list(measure(Settings()))


def imports_at_start(module: str, seen: set[str]) -> set[str]:
    """Return every module that importing this one imports, following the project's own modules."""
    path = ROOT / (module.replace(".", "/") + ".py")
    if not path.exists():
        path = ROOT / module.replace(".", "/") / "__init__.py"
    if module in seen or not path.exists():
        return seen | {module}
    seen = seen | {module}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                seen = imports_at_start(alias.name, seen)
        elif isinstance(node, ast.ImportFrom) and node.module:
            seen = imports_at_start(node.module, seen)
            for alias in node.names:
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists():
                    seen = imports_at_start(f"{node.module}.{alias.name}", seen)
    return seen


@pytest.mark.parametrize(
    "modules",
    [
        pytest.param(["bench.__main__"], id="any target of bench"),
        pytest.param(
            [
                *("bench.gpu_precompute", "precompute.shard_builder", "precompute.estimators"),
                *("precompute.estimators.scda", "precompute.estimators.windows"),
                *("precompute.threads", "pipeline.compiling"),
            ],
            id="workers of the GPU session",
        ),
    ],
)
def test_neither_ray_nor_a_command_line_is_imported(modules: list[str]) -> None:
    found: set[str] = set()
    for module in modules:
        found = imports_at_start(module, found)
    packages = {name.split(".")[0] for name in found}
    assert "schemas" in packages, "nothing was followed"
    assert not packages & {"ray", "tyro", "safetensors", "tqdm", "pydantic", "boto3", "s3fs"}
