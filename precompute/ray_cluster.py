"""Connect to Ray for the duration of a job: to an existing cluster, or to a local one it starts."""

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
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as tokens
from ray._private.node import Node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from schemas.cli import TerminatedError
from schemas.errors import UserError

POLL_SECONDS = 0.5
CONNECT_SECONDS = 10
ANSWER_SECONDS = 25
"""Seconds that `ray.init` may take. After that, a given cluster is treated as unreachable; a local
Ray is only reported as still starting (a loaded machine may need longer)."""
VITAL = {"raylet", "gcs_server"}
UNUSED_SERVICES = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods by which Ray's head node starts its autoscaler, the process that sends the output of
workers to drivers, and the server of the dashboard. A local job uses none of them, and to start
them takes about a third of the CPU time of `ray.init`."""
KILLED = "killed by `ray.kill`"
LOG_PREFIX = re.compile(r"^\S*\[?\d{4}-\d\d-\d\d[^\]]*\] *|^\(\w+\) +|\x1b\[[0-9;]*m")
"""Prefix of a line of Ray's log (time, level and process), and terminal color codes."""


@contextlib.contextmanager
def connect_to_ray(address: str | None) -> Iterator[None]:
    """Connect to Ray, or reuse this process's existing connection.

    SIGTERM raises `TerminatedError` inside the block.

    Raises:
        UserError: the cluster does not answer, or no local one starts.
    """
    # Silence Ray's own log, which is long: errors of the job are returned in the result rows.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Off by default: usage reports to Ray's developers, which would also take another process.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    starts_ray = not ray.is_initialized()
    before = signal.signal(signal.SIGTERM, terminate)
    stop = threading.Event()
    with hide_killed_actors():
        try:
            if starts_ray:
                connect(address)
                signal.signal(signal.SIGTERM, terminate)  # again: Ray installs its own handler
            ray.data.DataContext.get_current().enable_progress_bars = False
            if starts_ray and not address:
                threading.Thread(target=end_with_ray, args=(stop,), daemon=True).start()
            yield
        finally:
            stop.set()
            signal.signal(signal.SIGTERM, before)
            if starts_ray:
                ray.shutdown()


def connect(address: str | None) -> None:
    """Start a local Ray, or connect to the one at `address`. Raises UserError."""
    with capture_stderr() as (captured, terminal):
        try:
            with (
                choose_token(address),
                disable_unused_services(),
                watch_start(address, captured, terminal),
            ):
                if address:
                    check_reachable(address)
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
        except (UserError, TerminatedError):
            raise
        except Exception as error:  # Ray raises a plain Exception for a node that starts too slowly
            raise UserError(explain_refusal(address, error, read_last_line(captured))) from error


def explain_refusal(address: str | None, error: Exception, last_line: str) -> str:
    """Return one line that says why Ray is unavailable, in its own words, and what to do."""
    reason = " ".join(line.strip() for line in str(error).splitlines()[:3] if line.strip())
    if last_line and last_line not in reason:
        reason = f"{reason} ({last_line})"
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
    # The cluster answers, but runs another version or expects another token.
    return (
        f"the Ray cluster at {address} does not accept jobs from this checkout: {reason}; start "
        "one from here (docs/cluster.md), or leave --address out"
    )


def check_reachable(address: str) -> None:
    """Check within seconds that something listens at `address`; Ray would try for many minutes.

    Raises:
        OSError, ValueError: nothing listens there, or there is no such host or cluster.
    """
    if address == "auto":
        try:
            address = services.canonicalize_bootstrap_address(address) or ""
        except ConnectionError:
            return  # ray.init will not find a cluster either, and reports it
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("an address is HOST:PORT, or `auto` for the Ray of this machine")
    socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


@contextlib.contextmanager
def choose_token(address: str | None) -> Iterator[None]:
    """Choose Ray's authentication token, unless the user has set `RAY_AUTH_MODE`.

    A cluster started on a machine with a token file requires that token, yet Ray sends it to a
    cluster at a given address only if `RAY_AUTH_MODE` says so. A local Ray would write a token file
    into the home folder; the local one started here gets a temporary token instead.
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
def disable_unused_services() -> Iterator[None]:
    """Let a head node that is started in this block do without `UNUSED_SERVICES`.

    Ray has no option for it; a version without these methods starts what it always does.
    """
    methods = {name: vars(Node)[name] for name in UNUSED_SERVICES if name in vars(Node)}
    for name in methods:
        setattr(Node, name, lambda node, **options: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


@contextlib.contextmanager
def hide_killed_actors() -> Iterator[None]:
    """Drop Ray's messages about actors that a job kills when it ends early.

    They say that the tasks of these actors will be retried, which is not so. Ray has no option for
    it.
    """
    show = ray_worker.print_to_stdstream

    def show_others(data: dict[str, Any], **options: Any) -> None:
        if not any(KILLED in line for line in data["lines"]):
            show(data, **options)

    ray_worker.print_to_stdstream = show_others
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = show


@contextlib.contextmanager
def capture_stderr() -> Iterator[tuple[int, int]]:
    """Redirect stderr, including that of Ray's C++ code, to a file in memory.

    Its last line is part of the error message if Ray does not start.

    Returns:
        descriptors of that file and of the original stderr.
    """
    try:
        kept = os.dup(2)
    except OSError:  # the job was started with stderr closed
        kept = os.open(os.devnull, os.O_WRONLY)
    captured = os.memfd_create("ray-stderr")
    os.dup2(captured, 2)
    try:
        yield captured, kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(captured)


def read_last_line(captured: int) -> str:
    """Return the last line that Ray wrote, without its log prefix; "" if there is none."""
    # pread, because the descriptor shares its file position with stderr
    text = os.pread(captured, os.fstat(captured).st_size, 0).decode(errors="replace")
    lines = [LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


@contextlib.contextmanager
def watch_start(address: str | None, captured: int, terminal: int) -> Iterator[None]:
    """Handle SIGTERM and Ctrl-C while `ray.init` runs, and exit when a cluster does not answer.

    Python runs no signal handler while Ray's C++ code waits, so a thread learns of signals from the
    wakeup descriptor, which is written to immediately.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = threading.Event()
    signal_pipe, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def print_message(message: str) -> None:
        with contextlib.suppress(OSError):  # the reader of stderr may be gone
            os.write(terminal, f"{message}\n".encode())

    def exit_with(message: str, status: int) -> None:
        print_message(message)
        os._exit(status)

    def watch() -> None:
        timeout: float | None = ANSWER_SECONDS
        while not stop.is_set():
            ready, _, _ = select.select([signal_pipe], [], [], timeout)
            number = os.read(signal_pipe, 1)[0] if ready else 0
            if number == signal.SIGTERM:
                exit_with("terminated before Ray was up; run the same command again", 143)
            if number == signal.SIGINT:
                exit_with("interrupted before Ray was up; run the same command again", 130)
            if ready or stop.is_set():
                continue
            last_line = read_last_line(captured) or "no output so far"
            if address:
                silent = TimeoutError(f"silent for {ANSWER_SECONDS} s")
                exit_with(f"error: {explain_refusal(address, silent, last_line)}", 2)
            print_message(f"Ray is still starting ({last_line}); press Ctrl-C to stop")
            timeout = None

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        signal.set_wakeup_fd(before)
        os.write(wakeup, b"\0")
        thread.join()
        for descriptor in (signal_pipe, wakeup):
            os.close(descriptor)


def start_on_driver_node(actor: type) -> Any:
    """Start an actor on this node, so that it fails only with the driver; it reserves no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(actor).remote()


def end_with_ray(stop: threading.Event) -> None:
    """End this process when a vital process of the local Ray has died.

    Ray would end its driver by itself, but up to a minute later and without a message.
    """
    node = ray._private.worker._global_node  # Ray has no public API for this
    while not stop.wait(POLL_SECONDS):
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
