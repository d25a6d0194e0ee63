"""Stop at a loss or gradient that is not finite, and save what is needed to find out why."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pipeline import Batch
from train.checkpoint import explain_failed_write, get_rank_file, write_state
from train.data import BatchStream
from train.distributed import all_mean_, exit_all_ranks, is_main, raise_on_all_ranks, rank
from train.training_step import TrainingStep


class NanGuard:
    """Collects the losses of steps and checks them together, so the host rarely waits.

    The gradient is checked with the newest loss: a finite loss may have one that is not finite, and
    a checkpoint or an encoder with the weights of such a step is of no use.

    On a bad loss or gradient, RUN/failed/step-N/ gets state.pt (weights, queue and optimizers as
    they are now: before the update of step N if N is the newest step, else after later ones) and,
    from each rank, rank-0000.pt: the keys of step N's samples and, if N is the newest step, its
    views.
    """

    def __init__(self, step: TrainingStep, stream: BatchStream, out: Path) -> None:
        self.step, self.stream, self.out = step, stream, out
        self.pending: list[Tensor] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Remember the loss of a finished step for the next check."""
        losses = [value for name, value in scalars.items() if name.endswith("loss")]
        self.pending.append(torch.stack(losses).sum())  # over all groups: one bad loss shows

    def check(self, number: int, scalars: dict[str, Tensor]) -> None:
        """Stop all ranks if the running step `number` or a pending one is bad.

        Raises:
            UserError: on rank 0; the other ranks exit with status 2.
        """
        gradients = [p.grad for p in self.step.method.parameters() if p.grad is not None]
        values = [*self.pending, scalars["loss"].detach(), get_total_norm(gradients)]
        *losses, norm = all_mean_(torch.stack(values)).tolist()
        first = number - len(losses) + 1
        self.pending.clear()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                self.stop(step, loss, f"the loss of step {step} is {loss}", newest=number)
        if not math.isfinite(norm):
            finding = f"the gradient of step {number} is {norm}"
            self.stop(number, losses[-1], finding, newest=number)

    def stop(self, number: int, loss: float, finding: str, newest: int) -> None:
        """Save the state of the bad step `number`, and stop all ranks with `finding`."""
        folder = self.out / "failed" / f"step-{number:08d}"
        with raise_on_all_ranks(), explain_failed_write(f"{finding}; its state"):
            folder.mkdir(parents=True, exist_ok=True)
            last = self.stream.last
            views = collect_tensors(last) if last is not None and number == newest else None
            keys = self.stream.keys[number - newest - 1]
            write_state(
                folder / get_rank_file(rank()), {"step": number, "keys": keys, "views": views}
            )
            if is_main():
                state = {
                    "step": number,
                    "loss": loss,
                    "after_step": newest - 1,
                    "model": self.step.method.state_dict(),
                    "optimizer": self.step.state_dict(),
                }
                write_state(folder / "state.pt", state)
        hint = "" if number == newest else f" (--log-steps 1 stops right at step {number})"
        exit_all_ranks(
            f"{finding}; the keys of its images and the state are in {folder}.\n"
            "With another --out, try a lower learning rate, a warm-up or --precision fp32; the "
            "same command resumes from the last checkpoint, at an earlier step, with the same "
            f"batches{hint}"
        )


def collect_tensors(batch: Batch) -> dict[str, Any]:
    """Return the tensors of a batch by name, and its lists of tensors, on the CPU."""
    tensors: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.cpu()
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            tensors[field.name] = [item.cpu() for item in value]
    return tensors
