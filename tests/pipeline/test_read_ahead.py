"""The thread that reads ahead ends with its iterator, its consumer and its process."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import read_ahead
from pipeline.read_ahead import ReadAhead
from tests.pipeline.conftest import wait_until

FOLDER = Path(read_ahead.__file__).parent

EXIT = """
import sys, threading, time
import read_ahead  # alone: the package imports PyTorch and DALI

def items():
    try:
        yield "first"
        started.set()
        {wait}
        yield "second"
    finally:
        sys.stdout.write("ended\\n")  # in one piece, unlike print

read_ahead.EXIT_SECONDS = {seconds}
started = threading.Event()
opened = [read_ahead.ReadAhead(items(), 1) for _ in range(2)]
print(*(next(one) for one in opened), flush=True)
started.wait()
{exit}
"""


def run(wait: str, seconds: float, end: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a process that ends while two threads are waiting for their second item."""
    program = EXIT.format(wait=wait, seconds=seconds, exit=end)
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError('x')", 1)]
)
def test_the_end_of_the_process_waits_for_the_threads(end: str, status: int) -> None:
    process = run("time.sleep(0.3)", 30, end)
    assert process.returncode == status
    assert process.stdout.split() == ["first", "first", "ended", "ended"]


def test_a_thread_that_is_blocked_does_not_keep_the_process() -> None:
    process = run("threading.Event().wait()", 0.05)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split() == ["first", "first"]


def test_nothing_keeps_a_consumer_that_is_not_closed() -> None:
    consumer = ReadAhead(iter(range(100)), 1)
    assert next(consumer) == 0
    reference, thread = weakref.ref(consumer), consumer._thread
    del consumer
    gc.collect()
    assert reference() is None
    wait_until(lambda: not thread.is_alive())


def test_the_thread_may_collect_its_own_consumer() -> None:
    """Garbage is collected in any thread, and a thread that waited for itself would fail."""
    held: list[ReadAhead] = []
    is_held = threading.Event()

    def items() -> Iterator[int]:
        is_held.wait()
        held.clear()  # the last reference
        yield 1

    held.append(ReadAhead(items(), 1))
    reference, thread = weakref.ref(held[0]), held[0]._thread
    is_held.set()
    wait_until(lambda: not thread.is_alive())
    assert reference() is None
