"""Tests of starting Ray as in docs/cluster.md, and of the messages when it fails to answer."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private import worker as ray_worker

from precompute.ray_cluster import hide_killed_actors
from schemas import ShardDataset
from tests.conftest import encode, noise
from tests.ray_workers import ForkedJob

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
SECONDS = 240
"""Seconds to wait for a cluster to start, which takes a few seconds on an idle machine."""


@pytest.fixture
def home() -> Iterator[Path]:
    """Provide a folder as home and for Ray, with a short path because Ray puts sockets there."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def environment(home: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_worker_niceness"] = "0"  # by default all other tests come first
    own["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # a node that ends would wait 30 s for jobs
    return clean | own | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def start_node(start: list[str], variables: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("w") as output:
        return subprocess.Popen(start, env=variables, stdout=output, stderr=output)


def test_the_documented_commands_work_where_a_token_file_lies(home: Path, tmp_path: Path) -> None:
    """With a token file, `ray start --head` requires the token, so a job must send it."""
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    (tmp_path / "root" / "a").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "root" / "a" / f"{number}.jpg").write_bytes(encode(noise(number)))
    plain = environment(home)
    address = f"{socket.gethostbyname(socket.gethostname())}:{free_port()}"
    # without the services that a job does not use, because starting them takes long
    more = ["--include-log-monitor", "false", "--block"]
    head = ["--head", "--port", address.split(":")[1], "--include-dashboard", "false"]
    head += ["--no-monitor", "--num-cpus", "0"]  # the shards are built on the second node
    second = ["--address", address, "--num-cpus", "1"]
    nodes = []
    try:
        for number, (arguments, variables) in enumerate(
            [(head, plain), (second, environment(home, RAY_AUTH_MODE="token"))], 1
        ):
            deadline = time.monotonic() + SECONDS
            start = [RAY, "start", *arguments, *more]
            log = tmp_path / f"node{number}.log"
            nodes.append(start_node(start, variables, log))
            # written when the cluster lists the node
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                if nodes[-1].poll() is not None:  # Ray gives up after 30 s on a loaded machine
                    assert "InvalidAuthToken" not in log.read_text()
                    nodes[-1] = start_node(start, variables, log)
                time.sleep(0.1)
        job = [
            *("--dataset", "folder", "--root", tmp_path / "root", "--out", tmp_path / "out"),
            *("--estimator", "spectral", "--shard-samples", 2, "--address", address),
            *("--workers", 1, "--cpus-per-worker", 1),
        ]
        status, errors = ForkedJob(job, tmp_path / "errors", plain).wait(SECONDS)
        assert status == 0, errors
        assert len(ShardDataset.open(tmp_path / "out")) == 4
        (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        process = connect(address, plain)
        assert "InvalidAuthToken" in said(process)
        assert process.returncode == 2
    finally:
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait(60)


CONNECT = """
import sys
from precompute import ray_cluster
from schemas.cli import run
ray_cluster.ANSWER_SECONDS = int(sys.argv[2])

def main():
    with ray_cluster.connect_to_ray(sys.argv[1] or None):
        print("connected")

run(main)
"""


def connect(
    address: str, variables: dict[str, str], answer_seconds: int = 6
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, address, str(answer_seconds)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    _, errors = process.communicate(timeout=120)
    assert len(errors.splitlines()) == 1, errors
    return errors


def test_the_address_of_a_dead_cluster(home: Path) -> None:
    """RAY_ADDRESS names it, because otherwise `auto` would find the Ray of another test."""
    with socket.socket() as taken:  # keeps another test's Ray from listening on the port
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = connect("auto", environment(home, RAY_ADDRESS=address))
        assert "error: no Ray cluster answers at auto: " in said(process)
    assert process.returncode == 2


@pytest.mark.parametrize("terminated", [False, True])
def test_something_else_listens_there(home: Path, terminated: bool) -> None:
    """The server accepts the connection but never answers; signals are handled while waiting."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        seconds = 60 if terminated else 2
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = connect(address, environment(home), seconds)
        server.settimeout(100)
        connection, _ = server.accept()  # first that of `check_reachable`, then Ray's
        if terminated:
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
        message = said(process)
        connection.close()
    if terminated:
        assert process.returncode == 143
        assert "terminated before Ray was up" in message
    else:
        assert process.returncode == 2
        assert "silent for 2 s" in message


def test_a_folder_whose_name_is_too_long_for_a_socket(home: Path) -> None:
    folder = home / ("x" * 100)
    folder.mkdir()
    process = connect("", environment(home, RAY_TMPDIR=str(folder)))
    message = said(process)
    assert "Ray does not start here: " in message
    assert "cannot exceed 107 bytes" in message
    assert "set RAY_TMPDIR to a folder with a shorter name" in message


def test_a_local_ray_writes_no_token_into_the_home(home: Path) -> None:
    """It must start if the home is not writable, and leave no token file for other runs of Ray."""
    code = """
import os
import sys
from precompute.ray_cluster import choose_token, tokens
for home in sys.argv[1:]:
    os.environ["HOME"] = home
    with choose_token(None):
        print(len(os.environ.pop("RAY_AUTH_TOKEN")))
    tokens.AuthenticationTokenLoader.instance().reset_cache()
"""
    run = [sys.executable, "-c", code, str(home), "/proc/nowhere"]
    result = subprocess.run(run, env=environment(home), capture_output=True, text=True, check=True)
    assert result.stdout == "64\n64\n"
    assert not list(home.iterdir())


def test_ray_does_not_announce_that_killed_actors_are_retried(
    capsys: pytest.CaptureFixture,
) -> None:
    with hide_killed_actors():
        for line in ("Error: it was killed by `ray.kill`.", "a worker was killed: out of memory"):
            batch = {"lines": [line], "pid": "raylet", "is_err": False}
            ray_worker.print_to_stdstream(batch, ignore_prefix=False)
    shown = capsys.readouterr().out
    assert "out of memory" in shown
    assert "ray.kill" not in shown
