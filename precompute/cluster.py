"""Ray for the length of a job: a running cluster, or a local one that ends with it."""

import contextlib
import logging
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
import ray.data
from ray._private import services
from ray._private.authentication import authentication_token_setup as tokens
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.cli import TerminatedError
from schemas.errors import UserError

POLL_SECONDS = 0.5
CONNECT_SECONDS = 10
ANSWER_SECONDS = 25
"""How long `ray.init` may be silent: a cluster that does not answer by then is given up, a local
Ray that is still starting is reported (a loaded machine may need longer)."""
VITAL = {"raylet", "gcs_server"}
LOG_PREFIX = re.compile(r"^\S*\[?\d{4}-\d\d-\d\d[^\]]*\] *|^\(\w+\) +|\x1b\[[0-9;]*m")
"""Time, level and process before a line of Ray's log, and colors."""


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray, or use the connection of this process that is there already.

    SIGTERM ends the block by `TerminatedError`.

    Raises:
        UserError: no cluster answers, or no local one starts.
    """
    # Ray reports at length on itself; what concerns the job comes back in rows
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # and, unless told otherwise, to its makers; that would take a process of its own too
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    before = signal.signal(signal.SIGTERM, terminate)
    over = threading.Event()
    try:
        if ours:
            connect(address)
            signal.signal(signal.SIGTERM, terminate)  # Ray has put its own in place
        ray.data.DataContext.get_current().enable_progress_bars = False
        if ours and not address:
            threading.Thread(target=end_with_ray, args=(over,), daemon=True).start()
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)
        if ours:
            ray.shutdown()


def connect(address: str | None) -> None:
    """Start a local Ray, or connect to the one at `address`. Raises UserError."""
    with kept_stderr() as (said, terminal):
        try:
            with token(address), watched_start(address, said, terminal):
                if address:
                    reach(address)
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        except (UserError, TerminatedError):
            raise
        except Exception as error:  # a node that is slow to start is a plain Exception of Ray's
            raise UserError(refusal(address, error, last_words(said))) from error


def refusal(address: str | None, error: Exception, said: str) -> str:
    """Say in one line why Ray is not there, in its own words, and what to do."""
    reason = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    if said and said not in reason:
        reason = f"{reason} ({said})"
    if address is None:
        advice = ""
        if "path length" in reason or "AF_UNIX" in reason:
            advice = "; set RAY_TMPDIR to a folder with a shorter name"
        return f"Ray does not start here: {reason}{advice}"
    refused = "AuthToken" in reason or isinstance(error, (RuntimeError, ray.exceptions.RayError))
    if not refused:
        return (
            f"no Ray cluster answers at {address}: {reason}; look at the address and whether "
            "`ray start` still runs there, or leave --address out"
        )
    # a cluster of another version, or with another token
    return (
        f"the Ray cluster at {address} takes no job of this checkout: {reason}; start one from "
        "here (docs/cluster.md), or leave --address out"
    )


def reach(address: str) -> None:
    """Find out in seconds whether anything listens there: Ray itself tries for many minutes.

    Raises:
        OSError, ValueError: nothing listens there, or there is no such host or cluster.
    """
    if address == "auto":
        try:
            address = services.canonicalize_bootstrap_address(address) or ""
        except ConnectionError:
            return  # ray.init finds none either, and says so
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("an address is HOST:PORT, or `auto` for the Ray of this machine")
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


@contextlib.contextmanager
def token(address: str | None) -> Iterator[None]:
    """Choose the token that Ray asks for, where the user has not said what it is to be.

    A cluster that was started on a machine with a token file asks for it, yet Ray gives it to a
    cluster of a given address only if `RAY_AUTH_MODE` says so. A local Ray would write such a file
    into the home; one that lives as long as the job takes a token of its own instead.
    """
    if "RAY_AUTH_MODE" in os.environ:
        yield
    elif address:
        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        yield
    elif tokens.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        yield
    else:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        yield


@contextlib.contextmanager
def kept_stderr() -> Iterator[tuple[int, int]]:
    """Send stderr, Ray's C++ part's too, to a file in memory, to be shown if Ray does not start.

    Returns:
        descriptors of that file and of what stderr was before.
    """
    try:
        kept = os.dup(2)
    except OSError:  # the job was started with stderr closed
        kept = os.open(os.devnull, os.O_WRONLY)
    said = os.memfd_create("ray-stderr")
    os.dup2(said, 2)
    try:
        yield said, kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(said)


def last_words(said: int) -> str:
    """The last line that Ray wrote, without time and process; "" if there is none."""
    # pread: the descriptor shares its position with stderr
    text = os.pread(said, os.fstat(said).st_size, 0).decode(errors="replace")
    lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


@contextlib.contextmanager
def watched_start(address: str | None, said: int, terminal: int) -> Iterator[None]:
    """Hear SIGTERM and Ctrl-C while `ray.init` runs, and end when a cluster does not answer.

    Python runs no handler while Ray's C++ part waits, so a thread hears of signals through the
    wakeup descriptor, which is written to at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    heard, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def tell(message: str) -> None:
        with contextlib.suppress(OSError):  # who reads it may have left
            os.write(terminal, f"{message}\n".encode())

    def end(message: str, status: int) -> None:
        tell(message)
        os._exit(status)

    def watch() -> None:
        left: float | None = ANSWER_SECONDS
        while not over.is_set():
            ready, _, _ = select.select([heard], [], [], left)
            number = os.read(heard, 1)[0] if ready else 0
            if number == signal.SIGTERM:
                end("terminated before Ray was up; run the same command again", 143)
            if number == signal.SIGINT:
                end("interrupted before Ray was up; run the same command again", 130)
            if ready or over.is_set():
                continue
            words = last_words(said) or "it says nothing"
            if address:
                silent = TimeoutError(f"silent for {ANSWER_SECONDS} s")
                end(f"error: {refusal(address, silent, words)}", 2)
            tell(f"Ray is still starting ({words}); Ctrl-C ends")
            left = None

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.write(wakeup, b"\0")
        thread.join()
        for descriptor in (heard, wakeup):
            os.close(descriptor)


def start_beside_driver(actor: type) -> Any:
    """Start an actor without CPUs on this node, so that it goes only where the job goes."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor).remote()


def end_with_ray(over: threading.Event) -> None:
    """End this process when a process that the local Ray consists of has died.

    Left alone, Ray ends its driver too, but up to a minute later and without a word.
    """
    node = ray._private.worker._global_node  # Ray has no public way to ask
    while not over.wait(POLL_SECONDS):
        if dead := VITAL & {name for name, _ in node.dead_processes()}:
            print(
                f"error: Ray's {' and '.join(sorted(dead))} died; run the same command again "
                "to resume",
                file=sys.stderr,
                flush=True,
            )
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            os._exit(1)


def terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
