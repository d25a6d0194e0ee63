"""Time, memory and packages of this process, and memory of Ray workers, as /proc shows them."""

import importlib.util
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def peak_megabytes() -> float:
    """Return the peak memory of this process in MB (getrusage would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def is_installed(name: str) -> bool:
    """Return whether a package or module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # raised for the missing parent of nvidia.dali
        return False


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of `work`, its seconds, and the CPU seconds of this process."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu


def timed_row(name: str, work: Callable[[], Any]) -> Any:
    """Print the time of `work` and the peak memory of this process; return the result of `work`."""
    result, seconds, cpu = timed(work)
    print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak_megabytes():.0f} |", flush=True)
    return result


def call_in_other_process(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function without adding to the peak memory of this process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        executor.submit(function, *arguments).result()


class MemoryWatch:
    """Track the largest Ray worker in MB, without the object store that all of them share."""

    def __init__(self) -> None:
        self.most = 0.0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.over.wait(0.5):
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                if is_worker(command):
                    self.most = max(self.most, private_megabytes(command.parent))

    def __enter__(self) -> "MemoryWatch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def is_worker(command: Path) -> bool:
    """Return whether a process is a Ray worker, by its /proc/PID/cmdline."""
    try:
        return command.read_bytes().startswith(b"ray::")
    except OSError:  # the process has ended
        return False


def private_megabytes(process: Path) -> float:
    """Return a process's private memory in MB; 0 if it has ended."""
    try:
        fields = (process / "statm").read_text().split()
    except OSError:
        return 0.0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6
