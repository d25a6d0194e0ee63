"""Run the checks and measurements for a first session on a GPU with one command.

    python -m bench.gpu_session [--data URL]

Parts: environment, loader, step, precompute, and only if asked for (`--parts compiled`) compiled,
which takes minutes and needs a GPU. Each prints PASS, FAIL or SKIP and its figures. A part whose
packages are not installed is skipped, and one line names them; the loader needs torch, DALI,
OpenCV, numpy, pillow, pyarrow and fsspec. Without a GPU everything else runs in a small version on
the CPU.
"""

import argparse
import functools
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.process import find_missing, is_installed

LOADER = ("torch", "nvidia.dali", "cv2", "numpy", "PIL", "pyarrow", "fsspec")
STEP = (*LOADER, "torchvision", "tyro", "safetensors")
PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


@dataclass
class Report:
    """Verdicts by part, printed as they arrive."""

    verdicts: dict[str, str] = field(default_factory=dict)

    def add(self, part: str, verdict: str, text: str = "") -> None:
        self.verdicts[part] = verdict
        print(f"{verdict} {part}{f': {text}' if text else ''}", flush=True)

    def run(self, part: str, function: Callable[[], str | None], needed: tuple[str, ...]) -> None:
        """Run one part; any exception makes it fail."""
        if missing := find_missing(needed):
            self.add(part, SKIP, f"not installed here: {', '.join(missing)}")
            return
        start = time.monotonic()
        try:
            text = function()
        except AssertionError as error:
            self.add(part, FAIL, str(error))
        except Exception as error:  # the other parts are worth running
            traceback.print_exc(file=sys.stdout)
            self.add(part, FAIL, f"{type(error).__name__}: {error}")
        else:
            if text is None:
                self.add(part, SKIP, "there is no GPU")
            else:
                self.add(part, PASS, f"{text} ({time.monotonic() - start:.0f} s)")

    def summarize(self) -> str:
        """Return how many parts have each verdict, and which failed or were skipped."""
        counts = {
            verdict: [part for part, own in self.verdicts.items() if own == verdict]
            for verdict in (PASS, FAIL, SKIP)
        }
        named = []
        for verdict, parts in counts.items():
            which = f" ({', '.join(parts)})" if parts and verdict != PASS else ""
            named.append(f"{verdict} {len(parts)}{which}")
        return ", ".join(named)


def describe_environment() -> str:
    import torch

    details = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if is_installed("nvidia.dali"):
        import nvidia.dali

        details.append(f"DALI {nvidia.dali.__version__}")
    if not torch.cuda.is_available():
        return ", ".join([*details, "no GPU: a small version of everything runs on the CPU"])
    properties = torch.cuda.get_device_properties(0)
    from pipeline.compiling import find_compile_obstacle

    reason = find_compile_obstacle(torch.device("cuda", 0))
    return ", ".join(
        [
            *details,
            f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {properties.name} with "
            f"{properties.total_memory / 2**30:.0f} GiB",
            "views compiled" if reason is None else f"views NOT compiled ({reason})",
        ]
    )


def check_loader(report: Report, folder: Path, device: str, data: str | None) -> None:
    """Run the checks of `bench.gpu_loader` on pictures of all formats, and on `data`."""
    if missing := find_missing(LOADER):
        report.add("loader", SKIP, f"not installed here: {', '.join(missing)}")
        return
    from bench import gpu_loader

    own = gpu_loader.write_photos(folder / "photos", 28)
    size, side = (64, 224) if device == "cuda" else (7, 56)
    for name, check in gpu_loader.CHECKS.items():
        url, batch = (own, 7) if data is None or name == "formats" else (data, size)
        report.run(f"loader {name}", functools.partial(check, url, device, batch, side), LOADER)


def check_step(folder: Path, device: str, data: str | None) -> str:
    import torch

    from bench import gpu_loader, gpu_train

    settings = gpu_train.Settings() if device == "cuda" else gpu_train.Settings.small()
    url = data or gpu_loader.write_photos(
        folder / "step", 2 * max(settings.batch_sizes), formats=("JPEG",)
    )
    chosen = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return print_lines(gpu_train.measure(url, chosen, settings))


def print_lines(lines: Iterator[str]) -> str:
    """Print each line as soon as it is measured, in case the session is cut off.

    Returns:
        The first line.
    """
    printed = []
    for line in lines:
        print(line, flush=True)
        printed.append(line)
    return printed[0]


def check_compiled(folder: Path, device: str, data: str | None) -> str | None:
    import torch

    from bench import compiled_step, gpu_loader, gpu_train

    if device != "cuda":
        return None
    settings = gpu_train.Settings()
    url = data or gpu_loader.write_photos(
        folder / "compiled", 2 * max(settings.batch_sizes), formats=("JPEG",)
    )
    return print_lines(compiled_step.measure(url, torch.device("cuda", 0), settings))


def check_precompute(device: str) -> str:
    from bench import gpu_precompute

    settings = gpu_precompute.Settings()
    if device != "cuda":
        settings = gpu_precompute.Settings.small()
    return print_lines(gpu_precompute.measure(settings))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_session", description=__doc__)
    parser.add_argument("--data", help="shards for loader and step; generated if not given")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["loader", "step", "precompute"],
        choices=["loader", "step", "compiled", "precompute"],
    )
    options = parser.parse_args(argv)
    report = Report()
    report.run("environment", describe_environment, ("torch",))
    if report.verdicts["environment"] != PASS:
        return 1
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "loader" in options.parts:
            check_loader(report, folder, device, options.data)
        if "step" in options.parts:
            report.run("step", lambda: check_step(folder, device, options.data), STEP)
        if "compiled" in options.parts:
            report.run("compiled", lambda: check_compiled(folder, device, options.data), STEP)
        if "precompute" in options.parts:
            from bench.gpu_precompute import NEEDED

            report.run("precompute", lambda: check_precompute(device), NEEDED)
    print(report.summarize())
    return 1 if FAIL in report.verdicts.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
