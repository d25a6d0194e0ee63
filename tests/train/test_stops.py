"""Real processes under torchrun, killed, hung, on two agents, against an undisturbed run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train.trainer
from tests.train.runs import command, config, told

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LONGER = {"--log-steps": "1", "--epochs": "4", "--checkpoint-steps": "2"}


def torchrun(data: str, out: Path, *agent: str, **options: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run"]
    agent = agent or ("--nproc-per-node", "2", "--standalone")
    return [*start, *agent, "-m", "train", *command(data, out, **{**LONGER, **options})]


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory, two_ranks) -> Path:
    """Train twelve steps on two ranks."""
    out = tmp_path_factory.mktemp("whole")
    two_ranks(train.trainer.train, config(shards, out, log_steps=1, epochs=4, checkpoint_steps=2))
    return out


def started(shards, out, **options):
    """Start two processes and wait for a checkpoint; return torchrun and its workers' pids."""
    before = checkpoints(out)
    process = subprocess.Popen(
        torchrun(shards, out, **options), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while checkpoints(out) == before:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    return process, [int(pid) for pid in workers]


def checkpoints(out: Path) -> set[Path]:
    return set((out / "checkpoints").glob("step-*"))


def wait_for_end(pid: int) -> None:
    """Wait for a process that is not a child of this one."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_hung_and_killed_it_goes_on_exactly(shards, whole, tmp_path):
    """Stop one rank, kill it, then kill torchrun; run the same command each time."""
    process, workers = started(shards, tmp_path, **{"--rank-timeout": "4"})
    os.kill(workers[1], signal.SIGSTOP)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Sending process" in line:  # torchrun would wait 30 s before it kills its workers
            os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    assert (
        "error: rank 1 of 2 processes died or was silent for 4 s (--rank-timeout); "
        "run the same command again to resume from the last checkpoint\n"
    ) in lines, lines

    process, workers = started(shards, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    for pid in workers:  # the workers notice it, save and exit
        wait_for_end(pid)
    assert re.search(r"stopped and saved after step \d+; run the same command again", errors)
    assert not (tmp_path / "encoder.safetensors").exists()

    subprocess.run(torchrun(shards, tmp_path), env=ENVIRONMENT, check=True)
    assert len(told(tmp_path)) == 12
    assert told(tmp_path) == told(whole)
    first, second = (load_file(out / "encoder.safetensors") for out in (whole, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_two_agents_train_as_one_does(shards, whole, tmp_path):
    """Run --nnodes 2 on the loopback with one process each, like two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    agent = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    agent = (*agent, "--rdzv-endpoint", endpoint, "--rdzv-id", "test")
    cores = sorted(os.sched_getaffinity(0))
    halves = (
        cores[: len(cores) // 2],
        cores[len(cores) // 2 :],
    )  # as many threads per rank as in `whole`
    agents = [
        subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, half)), *torchrun(shards, tmp_path, *agent)],
            env=ENVIRONMENT,
        )
        for half in halves
    ]
    assert [process.wait(timeout=120) for process in agents] == [0, 0]
    assert told(tmp_path) == told(whole)
    first, second = (load_file(out / "encoder.safetensors") for out in (whole, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)
