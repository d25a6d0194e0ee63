"""Processes of tests that are forked from one that has imported torch already."""

import atexit
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.train.ranks import get_preloaded_context

SECONDS = 120


class ForkedProcess:
    """A running function, `target(*arguments)`, whose process a test can signal and kill.

    Args:
        log: file for what it prints; the target writes it.
    """

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
        self.log = log
        self.process = get_preloaded_context().Process(target=target, args=arguments)
        self.process.start()
        # a test that fails must not wait for the process when Python ends
        atexit.register(self.process.kill)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()


def run_forked(
    program: str, arguments: Sequence[str], folder: Path, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a program like `python -c PROGRAM ARGUMENTS`, without the seconds of its imports.

    Args:
        program: Python code.
        arguments: what the code finds in `sys.argv` after its name.
        folder: current folder of the process; gets two files with what it prints.
        environment: its environment variables; by default those of this process.
    """
    outputs = [folder / "forked.stdout", folder / "forked.stderr"]
    environment = dict(os.environ) if environment is None else environment
    process = get_preloaded_context().Process(
        target=execute, args=(program, list(arguments), folder, environment, outputs)
    )
    process.start()
    process.join(SECONDS)
    status = process.exitcode
    if status is None:
        process.kill()
        raise subprocess.TimeoutExpired(program, SECONDS)
    stdout, stderr = (path.read_text() for path in outputs)
    return subprocess.CompletedProcess([program, *arguments], status, stdout, stderr)


def execute(
    program: str,
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    outputs: list[Path],
) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, "")
    sys.argv = ["-c", *arguments]
    try:
        exec(program, {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
