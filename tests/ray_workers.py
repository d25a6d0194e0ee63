"""Ray workers that are forked from a process that has imported torch, DALI and Ray already.

These imports take a worker longer than its few images here, and every job starts workers of its
own. Everything else is Ray's: its processes, which it starts, watches and kills by their id, and
the program of a worker.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import ForkedProcess
from tests.ray_worker import ADDRESS
from tests.train.ranks import get_preloaded_context

COMMAND = Path(__file__).with_name("ray_worker.py")


@contextlib.contextmanager
def forked_workers(context: ForkServerContext | ForkContext | None = None) -> Iterator[None]:
    """Let a Ray that is started in this block fork its workers; they end with this process.

    A fork of a process that has imported DALI cannot use a GPU, so on a machine with one Ray starts
    its workers as it always does.

    Args:
        context: forks the process that forks the workers; by default that of all ranks.
    """
    if torch.cuda.is_available():
        yield
        return
    context = context or get_preloaded_context()
    with (
        tempfile.TemporaryDirectory(prefix="workers") as folder,
        pytest.MonkeyPatch.context() as up,
    ):
        address = os.path.join(folder, "socket")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(address, theirs, ours))
        process.start()
        from ray._private import ray_constants  # a fork in which Ray is imported has its settings

        theirs.close()
        assert ours.recv() == "ready"
        up.setenv(ADDRESS, address)
        up.setattr(ray_constants, "SETUP_WORKER_FILENAME", str(COMMAND))
        try:
            yield
        finally:
            ours.close()
            process.join()


def serve(address: str, owner: Connection, other_end: Connection) -> None:
    """Fork a worker for each request until the owner closes the other end of the connection."""
    other_end.close()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no worker is waited for
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(32)
        owner.send("ready")
        for number in itertools.count():
            ready, _, _ = select.select([server, owner], [], [])
            if owner in ready:
                return
            connection, _ = server.accept()
            with connection:
                descriptors, request = receive(connection)
                if request and "ray" not in sys.modules:  # which reads settings and token only once
                    os.environ.update(request["environment"])
                    import_worker()
                if request and os.fork() == 0:
                    owner.close()
                    server.close()
                    connection.close()
                    run_worker(number, descriptors, **request)
            for descriptor in descriptors:
                os.close(descriptor)


def import_worker() -> None:
    import ray.data  # noqa: F401

    import precompute.worker  # noqa: F401


def receive(connection: socket.socket) -> tuple[list[int], dict[str, Any] | None]:
    """Return the three standard descriptors of a request, and the rest of it.

    The rest is None if Ray has killed the process that sends it, which must not end this one.
    """
    content, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while part := connection.recv(1 << 16):
        content += part
    return descriptors, json.loads(content[1:]) if content.endswith(b"}") else None


def run_worker(
    number: int,
    descriptors: list[int],
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
) -> None:
    """Run Ray's program in this process, which becomes one of its workers, and end.

    Args:
        number: a different one for each worker.
    """
    status = 1
    try:
        skip_random_ids(1000 * number)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def skip_random_ids(count: int) -> None:
    """Draw ids from Ray's generator, whose state a fork copies.

    Two workers that drew the same id for the first object in their common store would end or hang.
    """
    from ray import ObjectRef  # a fork has imported it already

    for _ in range(count):
        ObjectRef.from_random()


class ForkedJob(ForkedProcess):
    """`python -m precompute` in a process and a session of its own, which is forked.

    Args:
        arguments: arguments of the command.
        log: file for what it prints on stderr.
        environment: its environment variables; by default those of this process.
    """

    def __init__(
        self, arguments: Sequence[object], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        environment = dict(os.environ) if environment is None else environment
        super().__init__(run_job, (list(map(str, arguments)), log, environment), log)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float) -> tuple[int, str]:
        """Return the exit status, and what it printed on stderr."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s"
        return self.process.exitcode, self.log.read_text()


def run_job(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, os.devnull), (2, str(log))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from precompute import __main__ as command

    sys.argv = ["precompute", *arguments]
    with forked_workers(multiprocessing.get_context("fork")):
        command.start()
