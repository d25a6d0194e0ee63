"""A loss that is not a number: stop, and leave what a person needs to find out why."""

import math
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from pipeline import Batch
from train.checkpoint import rank_file, write
from train.distributed import all_mean, fail, is_main, rank, together
from train.feed import Feed
from train.step import Step


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
        self.pending.append(scalars["loss"].detach())

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
        with together():
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
        later = "" if number == newest else f"--log-steps 1 stops right at step {number}; "
        fail(
            f"the loss of step {number} is {loss}; its images' keys and the state are in "
            f"{folder}.\nTry a lower --lr, --warmup-epochs or --precision fp32; the same command "
            "goes on from the last checkpoint, which is of an earlier step "
            f"({later}batches are the same)"
        )


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
