"""What a run tells: metrics.jsonl, TensorBoard, pictures of views, and a progress bar or log lines.

On rank 0 only.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from schemas import UserError


class Record:
    """The record of a run from step `start` on; lines that a killed process wrote beyond it go.

    A line of metrics.jsonl is one step: `step` and `epoch` (both from 1), `loss` and what else the
    method reports and `data_wait` (seconds that the step waited for its batch), both means over
    the ranks, `lr`, and `images_per_second` (of all ranks; over the steps since the last log line).
    Or it has the scores of an epoch, `knn_20` for one, with `epoch` and the `step` that ended it.

    Raises:
        UserError: Weights & Biases is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        epoch_steps: int,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.wandb = wandb_run(wandb_project, folder, config) if wandb_project else None
        self.total, self.epochs = total, -(-total // epoch_steps)
        self.path = folder / "metrics.jsonl"
        truncate(self.path, start)
        self.file = self.path.open("a")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self.started, self.first = time.monotonic(), start
        self.bar = (
            tqdm(total=total, initial=start, unit="step", smoothing=0.05)
            if sys.stderr.isatty()
            else None
        )

    def steps(self, rows: list[dict[str, Any]], seconds: float) -> None:
        """Tell of steps finished in the last `seconds`; the last of them on the terminal."""
        for row in rows:
            self.write(row)
        self.file.flush()
        last = rows[-1]
        waiting = sum(row["data_wait"] for row in rows) / seconds
        text = (
            f"epoch {last['epoch']}/{self.epochs}, loss {last['loss']:.4f}, "
            f"{last['images_per_second']:.1f} images/s, {waiting:.0%} waiting for data"
        )
        if self.bar is None:
            left = (time.monotonic() - self.started) * (self.total - last["step"])
            left /= max(1, last["step"] - self.first)
            self.say(f"step {last['step']}/{self.total}, {text}, {clock(left)} left")
        else:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(last["step"] - self.bar.n)

    def scores(self, scores: dict[str, float], step: int, epoch: int) -> None:
        """Tell how an epoch was evaluated after its last step."""
        self.write({"step": step, "epoch": epoch, **scores})
        told = ", ".join(f"{name} {value:.2%}" for name, value in scores.items())
        self.say(f"epoch {epoch}/{self.epochs}: {told}")

    def has_scores(self, step: int) -> bool:
        """Whether the epoch that this step ended was evaluated."""
        rows = map(json.loads, self.path.read_text().splitlines())
        return any(row["step"] == step and not is_step(row) for row in rows)

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same as curves."""
        self.file.write(json.dumps(row) + "\n")
        for name in row.keys() - {"step", "epoch"}:
            self.board.add_scalar(name, row[name], row["step"])
        if self.wandb is not None:
            self.wandb.log(row, step=row["step"])

    def views(self, sheet: Image.Image | None, step: int, epoch: int) -> None:
        """Show what was fed first in an epoch: TensorBoard and RUN/views."""
        if sheet is None:
            return
        path = self.folder / "views" / f"epoch-{epoch:04d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet.save(path)
        self.board.add_image("views", np.asarray(sheet), step, dataformats="HWC")

    def say(self, text: str) -> None:
        """One line for a person, above the bar if there is one."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def sync(self) -> None:
        """Bring all lines to the disk: a checkpoint must not outlive the steps before it."""
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


def is_step(row: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is a step; else it has the scores of an epoch."""
    return "loss" in row


@contextmanager
def disk_has_room(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our output has left
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror or error}); when that is mended, the "
            "same command goes on from the last checkpoint"
        ) from error


def wandb_run(project: str, folder: Path, config: dict[str, Any] | None) -> Any:
    """A run of Weights & Biases, the same one when the training goes on."""
    try:
        import wandb  # an extra that most users do without
    except ImportError as error:
        raise UserError("--wandb: not installed here; pip install wandb") from error
    return wandb.init(project=project, dir=folder, id=run_id(folder), resume="allow", config=config)


def run_id(folder: Path) -> str:
    """Drawn once a folder."""
    path = folder / "wandb-id"
    if not path.exists():
        path.write_text(uuid4().hex[:8])
    return path.read_text()


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line cut short by a kill; atomic."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in kept if json.loads(line)["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
