"""A loss that is not a number: stop, and leave what a person needs to find out why."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import Batch
from schemas import UserError
from train.checkpoint import rank_file, write
from train.distributed import all_mean, fail, is_main, rank, together
from train.data import Feed
from train.training_step import Step


class LossWatch:
    """Looks at the losses of the steps since it last did; only then does the host wait.

    RUN/failed/step-N/ then holds state.pt (weights, queue and optimisers as they are: right before
    the update of step N when N is the newest, else after later ones) and of each rank
    rank-0000.pt: the keys of step N's samples and, of the newest step, the views.
    """

    def __init__(self, step: Step, feed: Feed, out: Path) -> None:
        self.step, self.feed, self.out = step, feed, out
        self.pending: list[Tensor] = []

    def note(self, scalars: dict[str, Tensor]) -> None:
        """A step that is done, to be looked at later."""
        losses = [value for name, value in scalars.items() if name.endswith("loss")]
        self.pending.append(torch.stack(losses).sum())  # of all players: one bad one shows

    def check(self, number: int, scalars: dict[str, Tensor]) -> None:
        """Stop all ranks if step `number`, under way, or one that was noted has a bad loss.

        Raises:
            UserError: on rank 0; the other ranks exit with status 2.
        """
        losses = all_mean(torch.stack([*self.pending, scalars["loss"].detach()])).tolist()
        first = number - len(losses) + 1
        self.pending.clear()
        for bad, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                self.stop(bad, loss, newest=number)

    def stop(self, number: int, loss: float, newest: int) -> None:
        folder = self.out / "failed" / f"step-{number:08d}"
        with together(), told_anyway(number, loss):
            folder.mkdir(parents=True, exist_ok=True)
            last = self.feed.last
            views = tensors_of(last) if last is not None and number == newest else None
            keys = self.feed.keys[number - newest - 1]
            write(folder / rank_file(rank()), {"step": number, "keys": keys, "views": views})
            if is_main():
                state = {
                    "step": number,
                    "loss": loss,
                    "after_step": newest - 1,
                    "model": self.step.method.state_dict(),
                    "optimizer": self.step.state_dict(),
                }
                write(folder / "state.pt", state)
        later = "" if number == newest else f" (--log-steps 1 stops right at step {number})"
        fail(
            f"the loss of step {number} is {loss}; its images' keys and the state are in "
            f"{folder}.\nWith another --out, try a lower rate, a warm-up or --precision fp32; the "
            "same command goes on from the last checkpoint, of an earlier step, with the same "
            f"batches{later}"
        )


@contextmanager
def told_anyway(number: int, loss: float) -> Iterator[None]:
    """Where there is no room for the state, at least say why it was to be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"the loss of step {number} is {loss}; its state could not be written ({error})"
        ) from error


def tensors_of(batch: Batch) -> dict[str, Any]:
    """The tensors of a batch by name, and lists of tensors, on the CPU."""
    found: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.cpu()
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            found[field.name] = [each.cpu() for each in value]
    return found
