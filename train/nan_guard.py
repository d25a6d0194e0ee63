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
    """Collects losses and gradient norms of steps and checks them together.

    So the host rarely waits. A finite loss may have a gradient that is not finite, and a checkpoint
    or an encoder with the weights of such a step is of no use.

    On a bad loss or gradient, RUN/failed/step-N/ gets state.pt (weights, queue and optimizers as
    they are now: before the update of step N if N is the newest step, else after later ones) and,
    from each rank, rank-0000.pt: the keys of step N's samples and, if N is the newest step, its
    views.
    """

    def __init__(self, step: TrainingStep, stream: BatchStream, out: Path) -> None:
        self.step, self.stream, self.out = step, stream, out
        self.pending: list[tuple[int, Tensor]] = []
        """Number of a step; its loss and gradient norm, (2,), of one optimization group."""

    def check(self, number: int, is_due: bool, scalars: dict[str, Tensor]) -> None:
        """Remember loss and gradients of the running step; if due, check all that are remembered.

        Raises:
            UserError: on rank 0; the other ranks exit with status 2.
        """
        gradients = [p.grad for p in self.step.method.parameters() if p.grad is not None]
        values = torch.stack([scalars["loss"].detach(), get_total_norm(gradients)])
        self.pending.append((number, values))
        if not is_due:
            return
        steps, values_of_steps = zip(*self.pending, strict=True)
        self.pending.clear()
        for step, (loss, norm) in zip(
            steps, all_mean_(torch.stack(values_of_steps)).tolist(), strict=True
        ):
            if not math.isfinite(loss):
                self.stop(step, loss, f"the loss of step {step} is {loss}", newest=number)
            if not math.isfinite(norm):
                self.stop(step, loss, f"the gradient of step {step} is {norm}", newest=number)

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
