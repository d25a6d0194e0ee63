"""Measure time and memory of this process and of Ray workers (memory from /proc)."""

import importlib.util
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def read_peak_megabytes() -> float:
    """Return the peak memory of this process in 10^6 bytes.

    `getrusage` would include the memory of its parent.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])  # "kB" there means 1024 bytes
    return kibibytes * 1024 / 1e6


def is_installed(name: str) -> bool:
    """Return whether a package or module can be imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # raised for the missing parent of nvidia.dali
        return False


def find_missing(packages: Sequence[str]) -> list[str]:
    """Return those of the packages and modules that cannot be imported."""
    return [name for name in packages if not is_installed(name)]


def time_call(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of `work`, its seconds, and the CPU seconds of this process."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu


def read_cpu_seconds(process: int) -> float:
    """Return the CPU seconds that a process has used so far, given its ID."""
    stat = Path(f"/proc/{process}/stat").read_text()
    user, system = stat.rpartition(")")[2].split()[11:13]  # the name before ")" may have spaces
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def print_timing(name: str, work: Callable[[], Any]) -> Any:
    """Print the time of `work` and the peak memory of this process; return the result of `work`."""
    result, seconds, cpu = time_call(work)
    print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {read_peak_megabytes():.0f} |", flush=True)
    return result


def call_in_other_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function called in a new process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        return executor.submit(function, *arguments).result()


class MemoryWatch:
    """Track the peak memory of the largest Ray worker, without the shared object store.

    Attributes:
        peak_megabytes: the peak so far, in 10^6 bytes.
    """

    def __init__(self) -> None:
        self.peak_megabytes = 0.0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while not self.stop.wait(0.5):
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                if is_worker(command):
                    memory = read_private_megabytes(command.parent)
                    self.peak_megabytes = max(self.peak_megabytes, memory)

    def __enter__(self) -> "MemoryWatch":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()


def is_worker(command: Path) -> bool:
    """Return whether a process is a Ray worker, by its /proc/PID/cmdline."""
    try:
        return command.read_bytes().startswith(b"ray::")
    except OSError:  # the process has ended
        return False


def read_private_megabytes(process: Path) -> float:
    """Return a process's private memory in 10^6 bytes; 0 if it has ended."""
    try:
        fields = (process / "statm").read_text().split()
    except OSError:
        return 0.0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE") / 1e6
