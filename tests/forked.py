"""Run Python programs in processes that are forked from one that has imported torch already."""

import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.train.ranks import get_preloaded_context

SECONDS = 120


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
