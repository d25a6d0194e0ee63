"""Rates of several ways to do a thing, measured in turn in one run."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "ray", "numpy", "pillow")


@dataclass(frozen=True)
class Row:
    """Images a second, one value a repeat, each taken right after the other rows' values."""

    name: str
    rates: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def measure(ways: Mapping[str, Callable[[], int]], repeats: int) -> list[Row]:
    """Time each way `repeats` times after one run that is not counted, in turn: A B C A B C ...

    In turn, so that a machine whose speed drifts slows all of them alike; ratios then hold.

    Args:
        ways: does its work once and returns how many images that were.
    """
    for way in ways.values():
        way()
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            images = way()
            rates[name].append(images / (time.perf_counter() - start))
    return [Row(name, values) for name, values in rates.items()]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def show(title: str, rows: list[Row], relative_to: str) -> str:
    """A Markdown table: median, spread and ratio of medians."""
    base = next(row.median for row in rows if row.name == relative_to)
    lines = [
        f"### {title}",
        "",
        f"| | images/s, median | least .. most | of `{relative_to}` |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.name} | {row.median:.0f} | {min(row.rates):.0f} .. {max(row.rates):.0f} "
        f"| {row.median / base:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write(path: Path, tables: Mapping[str, list[Row]], settings: Mapping[str, Any]) -> None:
    """All rates, the settings and the machine, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(),
        "settings": dict(settings),
        "images_per_second": {
            title: {row.name: [round(rate, 2) for rate in row.rates] for row in rows}
            for title, rows in tables.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
