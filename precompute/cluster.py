"""Ray for the length of a job: a running cluster, or a local one that ends with it."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import ray
import ray.data

from schemas.cli import TerminatedError
from schemas.errors import UserError

POLL_SECONDS = 0.5
CONNECT_SECONDS = 10
VITAL = {"raylet", "gcs_server"}


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray, or use the connection of this process that is there already.

    SIGTERM ends the block by `TerminatedError`.

    Raises:
        UserError: no cluster answers.
    """
    # Ray reports at length on itself; what concerns the job comes back in rows
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # and, unless told otherwise, to its makers; that would take a process of its own too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        connect(address)
    ray.data.DataContext.get_current().enable_progress_bars = False
    over = threading.Event()
    if ours and not address:
        threading.Thread(target=end_with_ray, args=(over,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)
        if ours:
            ray.shutdown()


def connect(address: str | None) -> None:
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host:  # Ray itself tries for many minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        with silent_stderr():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (OSError, ValueError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error
    except (RuntimeError, ray.exceptions.RayError) as error:
        # a cluster of another version, or with another token
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        if address is None:
            raise UserError(f"Ray does not start here: {reason}") from error
        raise UserError(
            f"the Ray cluster at {address} takes no job of this checkout: {reason}; start one from "
            "here (docs/precompute.md), or leave --address out"
        ) from error


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Ray's C++ part says there at which level it logs; what fails comes as an exception."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def end_with_ray(over: threading.Event) -> None:
    """End this process when a process that the local Ray consists of has died.

    Left alone, Ray ends its driver too, but up to a minute later and without a word.
    """
    node = ray._private.worker._global_node  # Ray has no public way to ask
    while not over.wait(POLL_SECONDS):
        if dead := VITAL & {name for name, _ in node.dead_processes()}:
            print(
                f"error: Ray's {' and '.join(sorted(dead))} died; the same command goes on from "
                "here",
                file=sys.stderr,
                flush=True,
            )
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            os._exit(1)


def terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
