"""Measure the rates of several ways to do the same work, alternating between them in one run."""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from schemas.errors import UserError
from schemas.versions import version_of

Batch = TypeVar("Batch")

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "numpy", "pillow")

QUIET_SECONDS = 0.2
"""Seconds over which the CPU use is measured."""
LONGEST_WAIT = 15.0
"""Maximum number of seconds to wait for a quiet machine."""
QUIET_SHARE = 0.1
"""Maximum CPU use of a quiet machine, as a share of all cores."""


@dataclass(frozen=True)
class Row:
    """Images per second, one value per repeat; the repeats of all rows alternate."""

    name: str
    rates: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Way:
    """One way to do the work that is compared.

    Attributes:
        run: does the work once and returns the number of images.
        settle: called before the clock starts to use up batches prefetched while other ways ran.
    """

    run: Callable[[], int]
    settle: Callable[[], None] = lambda: None


def check_counts(options: Any, *names: str) -> None:
    """Check that options of these names are at least 1. Raises UserError."""
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def measure(ways: Mapping[str, Way], repeats: int) -> list[Row]:
    """Time each way `repeats` times after one run that is not counted, in turn: A B C A B C ...

    They alternate so that a machine whose speed drifts slows all of them equally; the ratios then
    hold.
    """
    for way in ways.values():
        way.run()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wait_until_quiet()
            way.settle()
            start = time.perf_counter()
            images = way.run()
            rates[name].append(images / (time.perf_counter() - start))
    return [Row(name, values) for name, values in rates.items()]


def wait_until_quiet() -> None:
    """Wait until the worker processes of other ways have filled their queues and are idle.

    Otherwise a way would be slowed down by the one before it, whose workers continue after its last
    batch.
    """
    for _ in range(round(LONGEST_WAIT / QUIET_SECONDS)):
        before = read_cpu_ticks()
        time.sleep(QUIET_SECONDS)
        busy, total = (now - then for now, then in zip(read_cpu_ticks(), before, strict=True))
        if busy < QUIET_SHARE * total:
            return


def read_cpu_ticks() -> tuple[int, int]:
    """Return the clock ticks of all cores since boot: those not idle, and all."""
    user, nice, system, idle, waiting, *further_ticks = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    total = user + nice + system + idle + waiting + sum(further_ticks)
    return total - idle - waiting, total


def describe_machine() -> dict[str, Any]:
    """Return the properties of this machine that affect the figures."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def format_table(title: str, rows: list[Row], baselines: Mapping[str, str]) -> str:
    """Return a Markdown table: median, spread, and the ratio to the median of `baselines`."""
    medians = {row.name: row.median for row in rows}
    lines = [
        f"### {title}",
        "",
        "| | images/s, median | min .. max | ratio |",
        "| --- | ---: | ---: | --- |",
    ]
    for row in rows:
        baseline = baselines.get(row.name)
        ratio = f"{row.median / medians[baseline]:.2f} x {baseline}" if baseline else ""
        lines.append(
            f"| {row.name} | {row.median:.1f} | {min(row.rates):.1f} .. {max(row.rates):.1f} "
            f"| {ratio} |"
        )
    return "\n".join(lines)


def list_rates(title: str, rows: list[Row]) -> dict[str, Any]:
    """Return all rates of a table, as `write` takes them."""
    rates = {row.name: [round(rate, 2) for rate in row.rates] for row in rows}
    return {"images_per_second": {title: rates}}


def write(path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write figures, with the settings and the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": describe_machine(), "settings": dict(settings), **figures}
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")  # a path as its name


def repeat_forever(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a loader, pass after pass."""
    return itertools.chain.from_iterable(itertools.repeat(loader))
