"""Checkpoints of a run: whole or not there, and refused under other settings.

    RUN/checkpoints/step-00000120/state.pt       settings, step, model with its queue, optimizer,
                                                 loader
                                  rank-0000.pt   the random generators of each rank

Nothing that a step computes depends on the number of processes but batch statistics, so another
number of them may resume, after any step.

A folder under this name is whole: ranks write into a hidden one, everything is fsynced, and rank 0
renames it. Files are read with weights_only=True, so that one from elsewhere can run no code.
"""

import os
import random
import shutil
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
from schemas.settings import differences, sentence
from train.distributed import is_main, rank, together, world_size

VERSION = 2
"""In version 1 each rank's file held the state of its loader."""

PREFIX = "step-"


class Restored(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        step: steps that are done; 0 where there is no checkpoint.
        world_size: processes that wrote it.
    """

    step: int
    world_size: int


class Resumable(Protocol):
    """A loader, an optimiser or several: whatever has an exact state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: where they lie; all ranks see the same one.
        keep: how many of the last stay.
        settings: what a checkpoint must have in common with this run, name -> plain value;
            among them `steps_per_epoch`.
        defaults: what a setting counts as that a checkpoint of an older version does not know.
    """

    folder: Path
    keep: int
    settings: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        return sorted(
            int(path.name.removeprefix(PREFIX)) for path in self.folder.glob(f"{PREFIX}*")
        )

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def save(self, step: int, model: nn.Module, optimizer: Resumable, loader: Resumable) -> None:
        """Write the state after `step` steps; called by all ranks.

        Raises:
            UserError: on every rank, when any could not write. Earlier checkpoints are untouched.
        """
        temporary = self.folder / f".{PREFIX}{step:08d}.tmp"
        with together():
            if is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together(), keeps_earlier(self.folder, step):
            write(temporary / rank_file(rank()), random_state())
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
                write(temporary / "state.pt", state)
        with together():
            if is_main():
                sync(temporary)
                temporary.rename(self.path(step))
                sync(self.folder)
                for old in self.steps()[: -self.keep]:
                    self.remove(old)

    def restore(self, model: nn.Module, optimizer: Resumable, loader: Resumable) -> Restored:
        """Load the last checkpoint, if there is one, on all ranks.

        Raises:
            UserError: it was made with other settings; names each that differs.
        """
        if not self.steps():
            return Restored(0, world_size())
        path = self.path(self.steps()[-1])
        state = read(path / "state.pt")
        self.check(path, state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        # a rank that was not there before keeps the generators that its seed gave it
        own = read(path / rank_file(rank())) if rank() < state["world_size"] else None
        loaders = state if state["version"] > 1 else own or read(path / rank_file(0))
        loader.load_state_dict(loaders["loader"])
        if own is not None:
            set_random_state(own)
        return Restored(state["step"], state["world_size"])

    def check(self, path: Path, state: dict[str, Any]) -> None:
        """Raises UserError unless this run may go on from `state`."""
        if state["version"] > VERSION:
            raise UserError(
                f"{path}: checkpoint version {state['version']}, this code reads up to {VERSION}"
            )
        if found := differences(state["settings"], self.settings, self.defaults):
            raise UserError(
                f"{path}: made with other settings: {sentence(found)}. "
                "Repeat the first command, or choose another --out"
            )

    def remove_unfinished(self) -> None:
        """Delete what a save or a deletion left that did not end."""
        for left in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(left)

    def remove(self, step: int) -> None:
        """Delete one so that none is ever seen half deleted."""
        doomed = self.folder / f".{PREFIX}{step:08d}.old"
        self.path(step).rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def keeps_earlier(folder: Path, step: int) -> Iterator[None]:
    """Turn a failure to write a checkpoint into a message that says what is left."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"{folder}: the checkpoint of step {step} could not be written ({error}); "
            "earlier ones are whole: with room made, the same command goes on from the last"
        ) from error


def rank_file(number: int) -> str:
    return f"rank-{number:04d}.pt"


def write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise UserError(
            f"{path}: cannot be read ({type(error).__name__}); "
            f"remove {path.parent} to go on from the checkpoint before it"
        ) from error


def sync(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and, where there is one, the GPU's generator, as plain values."""
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
