"""Real processes under torchrun, killed, hung, on two agents, against an undisturbed run."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.trainer
from tests.train.runs import command, config, told
from tests.train.torchrun import SECONDS, Torchrun, find_free_endpoint

AGENT = ("--nproc-per-node", "2", "--standalone", "--local-addr", "127.0.0.1")
TWELVE_STEPS = {"log_steps": 1, "epochs": 4, "checkpoint_steps": 2}
LONGER = {"--log-steps": "1", "--epochs": "4", "--checkpoint-steps": "2"}


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory, two_ranks) -> Path:
    """Train twelve steps on two ranks."""
    out = tmp_path_factory.mktemp("whole")
    two_ranks(train.trainer.train, config(shards, out, **TWELVE_STEPS))
    return out


def started(shards: str, out: Path, log: Path, **options: str) -> tuple[Torchrun, list[int]]:
    """Start two processes and wait for a checkpoint; return torchrun and its workers' pids."""
    before = checkpoints(out)
    process = Torchrun(AGENT, command(shards, out, **{**LONGER, **options}), log)
    process.wait_until(lambda: checkpoints(out) != before)
    workers = process.workers()
    assert len(workers) == 2
    return process, workers


def checkpoints(out: Path) -> set[Path]:
    return set((out / "checkpoints").glob("step-*"))


def wait_for_end(pid: int) -> None:
    """Wait for a process that is not a child of this one."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_resume_is_exact_after_a_hang_and_a_kill(shards, whole, tmp_path, two_ranks):
    """Stop one rank, kill it, then kill torchrun; run the same training each time."""
    out = tmp_path / "run"
    process, workers = started(shards, out, tmp_path / "hung", **{"--rank-timeout": "4"})
    os.kill(workers[1], signal.SIGSTOP)
    process.wait_until(lambda: "via signal SIGTERM" in process.said)
    os.kill(workers[1], signal.SIGKILL)  # torchrun would wait 30 s before it kills its workers
    assert process.wait() == 1
    assert (
        "error: rank 1 of 2 processes died or was silent for 4 s (--rank-timeout); "
        "run the same command again, which resumes from the last checkpoint if there is one\n"
    ) in process.said

    process, workers = started(shards, out, tmp_path / "killed")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for pid in workers:  # the workers notice it, save and exit
        wait_for_end(pid)
    assert re.search(r"stopped and saved after step \d+; run the same command again", process.said)
    assert not (out / "encoder.safetensors").exists()

    two_ranks(train.trainer.train, config(shards, out, **TWELVE_STEPS))
    assert len(told(out)) == 12
    assert told(out) == told(whole)
    first, second = (load_file(path / "encoder.safetensors") for path in (whole, out))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_agents_train_as_one_does(shards, whole, tmp_path):
    """Run --nnodes 2 on the loopback with one process each, like two machines.

    The first agent and its worker are the real command, the second are forked.
    """
    out = tmp_path / "run"
    agent = [
        *("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", find_free_endpoint(), "--rdzv-id", "test"),
        *("--local-addr", "127.0.0.1"),
    ]
    training = command(shards, out, **LONGER)
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)  # as many threads per rank as in `whole`
    forked = Torchrun(
        agent, training, tmp_path / "log", partial(os.sched_setaffinity, 0, cores[-half:])
    )
    real = subprocess.run(
        [
            *("taskset", "-c", ",".join(map(str, cores[:half]))),
            *(sys.executable, "-m", "torch.distributed.run", *agent, "-m", "train", *training),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=SECONDS,
    )
    assert (real.returncode, forked.wait()) == (0, 0), forked.said
    assert told(out) == told(whole)
    first, second = (load_file(path / "encoder.safetensors") for path in (whole, out))
    assert all(torch.equal(first[key], second[key]) for key in first)
