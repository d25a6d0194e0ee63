"""Metrics of a run: metrics.jsonl, TensorBoard, images of views, a progress bar or log lines."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from schemas import UserError
from schemas.json_lines import read_json_lines
from schemas.storage import write_atomically
from train.distributed import all_mean_


class MetricsBuffer:
    """Collect metrics of steps on the device and bring them to the host in one copy.

    Collecting never waits for the device.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows: list[dict[str, Any]] = []
        self.scalars: list[Tensor] = []  # one per step, (names,) on the device
        self.waits: list[float] = []
        self.names: list[str] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time until now from the measured rate."""
        self.since = time.perf_counter()

    def add(self, scalars: dict[str, Tensor], waited: float, **on_host: float) -> None:
        """Add one step: scalars of the method, seconds waited for data, values on the host."""
        self.names = list(scalars)
        self.scalars.append(torch.stack([value.detach() for value in scalars.values()]))
        self.waits.append(waited)
        self.rows.append(on_host)

    def take(self) -> tuple[list[dict[str, Any]], float]:
        """Remove and return the steps, averaged over the ranks, and the seconds that they took."""
        values = all_mean_(torch.stack(self.scalars)).tolist()
        waits = all_mean_(torch.tensor(self.waits, dtype=torch.float64)).tolist()
        seconds = time.perf_counter() - self.since
        rate = len(self.rows) * self.batch_size / seconds
        rows = [
            {
                **on_host,
                **dict(zip(self.names, value, strict=True)),
                "images_per_second": round(rate, 2),
                "data_wait": round(wait, 6),
            }
            for on_host, value, wait in zip(self.rows, values, waits, strict=True)
        ]
        self.rows, self.scalars, self.waits = [], [], []
        self.restart_clock()
        return rows, seconds


class MetricsLogger:
    """Write the metrics of a run from step `start` on; exists on rank 0 only.

    Lines beyond `start`, written by a process that was killed later, are removed.

    A line of metrics.jsonl is one step. It has `step` and `epoch` (both from 1); the method's
    scalars, with `loss`, and `data_wait` (seconds that the step waited for its batch), all averaged
    over the ranks; `lr`; and `images_per_second` (over all ranks and the steps since the last log
    line).
    Other lines hold the scores of an epoch, such as `knn_20`, with `epoch` and its last `step`.

    Raises:
        UserError: Weights & Biases is requested but not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        epoch_steps: int,
        epoch_name: str = "epoch",
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.wandb = start_wandb_run(wandb_project, folder, config) if wandb_project else None
        self.total, self.epochs = total, -(-total // epoch_steps)
        self.epoch_name = epoch_name
        self.path = folder / "metrics.jsonl"
        self.steps_made = sum(map(is_step, drop_lines_after(self.path, start, epoch_steps)))
        """Number of steps made; `step` differs if the run was resumed with another batch."""
        self.file = self.path.open("a")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=self.steps_made + 1)
        self.started, self.first = time.monotonic(), start
        self.warned: set[str] = set()
        self.bar = (
            tqdm(total=total, initial=start, unit="step", smoothing=0.05)
            if sys.stderr.isatty()
            else None
        )

    def log_steps(self, rows: list[dict[str, Any]], seconds: float) -> None:
        """Log steps that were finished in the last `seconds`; print the last one."""
        for row in rows:
            self.write(row)
        self.file.flush()
        last = rows[-1]
        waiting = sum(row["data_wait"] for row in rows) / seconds
        text = (
            f"{self.epoch_name} {last['epoch']}/{self.epochs}, loss {last['loss']:.4f}, "
            f"{last['images_per_second']:.1f} images/s, {waiting:.0%} waiting for data"
        )
        if self.bar is None:
            left = (time.monotonic() - self.started) * (self.total - last["step"])
            left /= max(1, last["step"] - self.first)
            self.print(
                f"step {last['step']}/{self.total}, {text}, {tqdm.format_interval(left)} left"
            )
        else:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(last["step"] - self.bar.n)

    def log_scores(self, scores: dict[str, float], step: int, epoch: int) -> None:
        """Log and print the evaluation of an epoch after its last step."""
        self.write({"step": step, "epoch": epoch, **scores})
        text = ", ".join(f"{name} {value:.2%}" for name, value in scores.items())
        self.print(f"{self.epoch_name} {epoch}/{self.epochs}: {text}")

    def has_scores(self, epoch: int) -> bool:
        """Return whether this epoch was evaluated."""
        rows = read_json_lines(self.path)
        return any(row["epoch"] == epoch and not is_step(row) for row in rows)

    def write(self, row: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl, and its values to TensorBoard and Weights & Biases."""
        self.file.write(json.dumps(row) + "\n")
        self.steps_made += is_step(row)
        for name in row.keys() - {"step", "epoch"}:
            self.board.add_scalar(name, row[name], self.steps_made)
        if self.wandb is not None:
            self.wandb.log(row, step=self.steps_made)

    def log_views(self, sheet: Image.Image | None, epoch: int) -> None:
        """Save an image of an epoch's first views to TensorBoard and RUN/views.

        Their step is the next one to be logged: a logger has all steps of the epochs before.
        """
        if sheet is None:
            return
        path = self.folder / "views" / f"epoch-{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        self.board.add_image("views", np.asarray(sheet), self.steps_made + 1, dataformats="HWC")

    def print(self, text: str) -> None:
        """Print one line, above the progress bar if there is one."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def print_warnings(self, warnings: list[str], step: int) -> None:
        """Print each warning the first time that it is given, and again after the last step."""
        for warning in warnings:
            if warning not in self.warned or step == self.total:
                self.print(f"warning: {warning}")
            self.warned.add(warning)

    def sync(self) -> None:
        """Flush all lines to the disk: a checkpoint must not outlive the steps before it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.bar is not None:
            self.bar.close()

    def abandon(self) -> None:
        """End threads and close files after an error, which stays the one that is reported."""
        for file in (self.file, self.board):
            with suppress(OSError):  # the disk may be full
                file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=1)
        if self.bar is not None:
            self.bar.close()


def is_step(row: dict[str, Any]) -> bool:
    """Return True for a line of a step in metrics.jsonl, False for the scores of an epoch."""
    return "loss" in row


@contextmanager
def translate_write_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of this program's output has left
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror or error}); fix it and run the same "
            "command again to resume from the last checkpoint"
        ) from error


def start_wandb_run(project: str, folder: Path, config: dict[str, Any] | None) -> Any:
    """Start a run of Weights & Biases, or continue the one of this folder."""
    try:
        import wandb  # an optional dependency
    except ImportError as error:
        raise UserError("--wandb: not installed here; pip install wandb") from error
    return wandb.init(
        project=project, dir=folder, id=get_wandb_id(folder), resume="allow", config=config
    )


def get_wandb_id(folder: Path) -> str:
    """Return the id of this folder's run at Weights & Biases; it is drawn once."""
    path = folder / "wandb-id"
    if not path.exists():
        write_atomically(path, uuid4().hex[:8].encode())
    return path.read_text()


def drop_lines_after(path: Path, step: int, epoch_steps: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, and a last line that a kill cut short; atomic. Return the rest.

    Lines of finished epochs stay whatever their step: it may have been counted with another batch.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    epochs, inside = divmod(step, epoch_steps)

    def is_before(row: dict[str, Any]) -> bool:
        return row["epoch"] <= epochs or (
            inside > 0 and row["epoch"] == epochs + 1 and row["step"] <= step
        )

    try:
        kept = [row for row in read_json_lines(path) if is_before(row)]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: a line is damaged, as by a power cut; remove it and run the same "
            "command again"
        ) from error
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept
