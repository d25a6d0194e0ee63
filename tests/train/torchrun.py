"""torchrun as on a cluster, but forked from a process that has imported torch already.

Importing torch, torchvision and DALI takes a rank longer than its few steps here. Everything else
is torchrun's own: command line, rendezvous, agents, restarts, and processes that signals reach. One
test, `test_two_agents_train_as_one_does`, starts the real command beside a forked agent.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import run

from tests.forked import ForkedProcess
from train import __main__ as command

SECONDS = 400
"""Seconds for one start with a few steps; an idle machine needs a tenth."""

Patch = Callable[[], None]
"""Changes what a worker runs, in the worker, before it starts."""


def find_free_endpoint() -> str:
    """Return HOST:PORT on the loopback for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Torchrun(ForkedProcess):
    """An agent of torchrun and its workers, which run `python -m train`.

    Args:
        agent: options of torchrun.
        options: options of the run.
        log: file for what all of them print.
        patch: picklable function that each worker calls first.
    """

    def __init__(
        self, agent: Sequence[str], options: Sequence[str], log: Path, patch: Patch | None = None
    ) -> None:
        super().__init__(run_agent, ([*agent, "train", *options], log, patch), log)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def wait(self) -> int:
        """Return the exit status; kill one that hangs and show what it printed."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.terminate()
            pytest.fail(f"still running after {SECONDS} s: {self.said}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)


def run_agent(arguments: list[str], log: Path, patch: Patch | None) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # docs/train.md, elastic jobs
    launch = run.elastic_launch

    def train(*arguments: str) -> None:
        """Run as a worker; torchrun gives the command line of Python, `-u train OPTIONS...`."""
        torch.set_num_threads(1)
        if patch is not None:
            patch()
        sys.argv = list(arguments[1:])
        try:
            command.start()
        except SystemExit as end:
            if end.code:
                raise
            # the agent waits for a function to return

    def fork_workers(config: Any, entrypoint: str) -> Any:
        return launch(replace(config, start_method="fork"), train)

    with mock.patch.object(run, "elastic_launch", fork_workers):
        run.main(arguments)
