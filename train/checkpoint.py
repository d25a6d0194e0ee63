"""Checkpoints of a run: written completely or not at all, refused under other settings.

    RUN/checkpoints/step-00000120/state.pt       settings, step, model with its queue, optimizer,
                                                 loader
                                  rank-0000.pt   the random generators of each rank

Only batch statistics depend on the number of processes, so a run may resume with another number
of them after any step. It may resume with another global batch where an epoch ended; steps are then
counted anew, as if all epochs had had that batch.

A folder of this name is complete: ranks write into a hidden folder, every file is fsynced, and
rank 0 renames it. Files are read with weights_only=True, so a foreign file cannot run code.
"""

import math
import os
import platform
import random
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from schemas import UserError
from schemas.settings import find_differences, format_differences
from schemas.streams import sync_folder
from train.config import use_current_names
from train.distributed import gather_objects, is_main, raise_on_all_ranks, rank, world_size
from train.process_group import HOST_FULL

VERSION = 2
"""In version 1 each rank's file held the state of its loader."""

PREFIX = "step-"
NAME = re.compile(rf"{PREFIX}([0-9]{{8,}})")

DAMAGE = (
    *(RuntimeError, EOFError, UnpicklingError, zipfile.BadZipFile, zlib.error),
    *(ValueError, LookupError, AttributeError, TypeError),
)
"""What torch.load raises for a damaged file (the second line: if its pickle is damaged)."""

MISFIT = re.compile(r"loading state_dict|loaded state dict")
"""How torch's errors name a state of other weights, of a module and of an optimizer."""

SECONDS_UNTIL_VISIBLE = 75.0
"""Seconds to wait for a path that rank 0 sees: NFS caches listings for up to 60 s (acdirmax)."""


class Restored(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        step: number of finished steps as this run counts them; 0 without a checkpoint.
        world_size: number of processes that wrote it.
        batch_size: global batch of the run that wrote it; None without a checkpoint.
    """

    step: int
    world_size: int
    batch_size: int | None = None


class Resumable(Protocol):
    """An object with an exact state: a loader, an optimizer or several optimizers."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: their folder, the same on all ranks.
        keep: number of latest checkpoints to keep.
        settings: settings that a checkpoint must share with this run, name -> plain value;
            `steps_per_epoch` is one of them.
        defaults: values that stand in for settings that a checkpoint of an older version lacks.
        batch_may_change: True if the global batch may be another one where an epoch ended.
        changeable: settings that may differ, because they change the results only by rounding or
            batch statistics.
    """

    folder: Path
    keep: int
    settings: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    batch_may_change: bool = False
    changeable: frozenset[str] = frozenset()

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, ascending; ignore copies of other names."""
        matches = (NAME.fullmatch(path.name) for path in self.folder.glob(f"{PREFIX}*"))
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, model: nn.Module, optimizer: Resumable, loader: Resumable) -> None:
        """Write the state after `step` steps; every rank must call it.

        Raises:
            UserError: on every rank, if any rank could not write. Earlier checkpoints stay intact.
        """
        temporary = self.folder / f".{PREFIX}{step:08d}.tmp"
        with raise_on_all_ranks():
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        hint = (
            "; earlier ones are intact: free some space and run the same command again to resume "
            "from the last"
        )
        subject = f"{self.folder}: the checkpoint of step {step}"
        with raise_on_all_ranks(), explain_failed_write(subject, hint):
            write_state(temporary / get_rank_file(rank()), get_random_state())
            if is_main():
                state = {
                    "version": VERSION,
                    "settings": self.settings,
                    "world_size": world_size(),
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "loader": loader.state_dict(),  # the same on every rank
                }
                write_state(temporary / "state.pt", state)
        with raise_on_all_ranks():
            if is_main():
                sync_folder(temporary)
                temporary.rename(self.path(step))
                sync_folder(self.folder)
                for old in self.steps()[: -self.keep]:
                    self.remove(old)

    def agree_on_last(self) -> int | None:
        """Return, on all ranks, the step of the last checkpoint that rank 0 sees, or None.

        Machines may list a shared folder differently for a while after a checkpoint was written.
        """
        steps = self.steps() if is_main() else []
        return gather_objects(steps[-1] if steps else None)[0]

    def restore(
        self, last: int | None, model: nn.Module, optimizer: Resumable, loader: Resumable
    ) -> Restored:
        """Load the checkpoint `last`, which `agree_on_last` returned, if there is one.

        Raises:
            UserError: it was made with other settings; the message names each that differs. Or its
                weights do not fit, or it does not become visible on this machine.
        """
        if last is None:
            return Restored(0, world_size())
        path = self.path(last)
        wait_until_visible(path)
        state = read_state(path / "state.pt", checks=is_main())  # all ranks read the same file
        step = self.count_steps(path, state)
        with explain_misfit(path):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        # a rank that did not exist when the checkpoint was written keeps its seeded generators
        own = read_state(path / get_rank_file(rank())) if rank() < state["world_size"] else None
        loaders = state if state["version"] > 1 else own or read_state(path / get_rank_file(0))
        loader.load_state_dict(loaders["loader"])
        if own is not None:
            set_random_state(own)
        return Restored(step, state["world_size"], state["settings"].get("batch_size"))

    def count_steps(self, path: Path, state: dict[str, Any]) -> int:
        """Return the finished steps of `state` as this run counts them.

        Raises:
            UserError: this run may not resume from `state`.
        """
        if state["version"] > VERSION:
            raise UserError(
                f"{path}: checkpoint version {state['version']}, this code reads up to {VERSION}"
            )
        saved, step = use_current_names(state["settings"]), state["step"]
        differs = saved.get("batch_size") != self.settings.get("batch_size")
        if differs and self.batch_may_change and step < saved["epochs"] * saved["steps_per_epoch"]:
            epochs, inside = divmod(step, saved["steps_per_epoch"])
            if inside:
                raise UserError(
                    f"{path}: epoch {epochs + 1} has begun with batches of {saved['batch_size']}; "
                    f"--batch-size {self.settings['batch_size']} is possible where an epoch ended: "
                    "remove this checkpoint to resume from an earlier one, or repeat the first "
                    "command"
                )
            saved = self.with_own_batch(saved)
            step = epochs * self.settings["steps_per_epoch"]
        saved |= {name: self.settings[name] for name in self.changeable}
        if changed := find_differences(saved, self.settings, self.defaults):
            raise UserError(
                f"{path}: made with other settings: {format_differences(changed)}. "
                "Repeat the first command, or choose another --out"
            )
        return step

    def with_own_batch(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return saved settings with this run's global batch, and what follows from it.

        A peak rate that was scaled by the batch then differs too; one that was given does not.
        """
        names = ["batch_size", "steps_per_epoch"]
        factor = self.settings["batch_size"] / saved["batch_size"]
        if math.isclose(saved["optim.lr"] * factor, self.settings["optim.lr"]):
            names.append("optim.lr")
        return saved | {name: self.settings[name] for name in names}

    def rename_last(self, step: int) -> None:
        """Rename the last checkpoint to this run's count of steps; if that differs, remove others.

        A checkpoint itself contains the batch that its steps were counted with, so a crash in
        between loses nothing.
        """
        *earlier, last = self.steps() or [step]
        if last == step:
            return
        for old in earlier:
            self.remove(old)
        self.path(last).rename(self.path(step))
        sync_folder(self.folder)

    def remove_unfinished(self) -> None:
        """Delete the remains of an interrupted save or deletion."""
        for leftover in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(leftover)

    def remove(self, step: int) -> None:
        """Delete a checkpoint; it is hidden first, so a partly deleted one is never visible."""
        hidden = self.folder / f".{PREFIX}{step:08d}.old"
        self.path(step).rename(hidden)
        shutil.rmtree(hidden)


@contextmanager
def explain_failed_write(subject: str, hint: str = "") -> Iterator[None]:
    """Turn a failure to write a state into the message that its subject could not be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(f"{subject} could not be written ({error}){hint}") from error


@contextmanager
def explain_misfit(path: Path) -> Iterator[None]:
    """Turn torch's error about a state of other weights into a UserError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not MISFIT.search(str(error)):  # out of memory, or a bug
            raise
        reason = " ".join(str(error).split("\n\t")[:2]).rstrip(" .")
        raise UserError(
            f"{path}: does not fit the networks, whose code has changed since ({reason}). Restore "
            "that code, or choose another --out"
        ) from error


def wait_until_visible(path: Path) -> None:
    """Wait for a file or folder that rank 0 sees.

    Raises:
        UserError: it does not appear within SECONDS_UNTIL_VISIBLE.
    """
    deadline = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: rank 0 sees it, but {platform.node()} does not after "
                f"{SECONDS_UNTIL_VISIBLE:g} s; mount the folder of --out on every machine, and run "
                "the same command again"
            )
        time.sleep(0.1)


def get_rank_file(number: int) -> str:
    return f"rank-{number:04d}.pt"


def write_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch closes its archive after a failed write too, which fails for another reason
            if isinstance(error.__context__, OSError | KeyboardInterrupt):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, checks: bool = True) -> dict[str, Any]:
    """Read a file that `write_state` wrote.

    Args:
        checks: compare the checksums in the file, which torch.load does not; takes a second per GB.

    Raises:
        UserError: it is missing, damaged or cannot be read. Only for a file that is damaged or gone
            does the message advise to remove the checkpoint.
        RuntimeError: memory has run out, see `translate_out_of_memory`.
    """
    advice = f"remove {path.parent} to resume from the checkpoint before it, if there is one"
    try:
        if checks:
            with zipfile.ZipFile(path) as archive:
                if (part := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"{part} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing; if no machine that shares the folder sees it, {advice}"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); look at its permissions and at "
            "the disk, and run the same command again"
        ) from error
    except DAMAGE as error:
        if HOST_FULL in str(error):
            raise
        raise UserError(f"{path}: damaged ({type(error).__name__}); {advice}") from error


def get_random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the GPU's generators as plain values."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  libraries draw from it
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": keys}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    numpy = state["numpy"]
    keys = numpy["state"]["key"].numpy().astype(np.uint32)
    random.setstate(state["python"])
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
