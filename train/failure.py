"""A loss that is not a number: stop, and leave what a person needs to find out why."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline import Batch
from train.checkpoint import rank_file, write
from train.distributed import fail, is_main, rank, together
from train.feed import Feed
from train.step import Step


def stop_if_not_finite(rows: list[dict[str, Any]], step: Step, feed: Feed, out: Path) -> None:
    """Stop all ranks at the first of these steps whose loss is not finite; before `step.update`.

    RUN/failed/step-N/ then holds state.pt (weights, queue and optimiser as they are now: right
    before the update of step N when it is the last of `rows`, else after it) and, of each rank,
    rank-0000.pt: the keys of step N's samples and the views that were fed last.
    """
    bad = next((row for row in rows if not math.isfinite(row["loss"])), None)
    if bad is None:
        return
    number, newest = bad["step"], rows[-1]["step"]
    folder = out / "failed" / f"step-{number:08d}"
    with together():
        folder.mkdir(parents=True, exist_ok=True)
        views = tensors_of(feed.last) if feed.last is not None and number == newest else None
        keys = feed.keys[number - newest - 1]
        write(folder / rank_file(rank()), {"step": number, "keys": keys, "views": views})
        if is_main():
            state = {
                "step": number,
                "loss": bad["loss"],
                "after_step": newest - 1,
                "model": step.method.state_dict(),
                "optimizer": step.optimizer.state_dict(),
            }
            write(folder / "state.pt", state)
    later = "" if number == newest else f"--log-steps 1 stops right at step {number}; "
    fail(
        f"the loss of step {number} is {bad['loss']}; its images' keys and the state are in "
        f"{folder}.\nTry a lower --lr, --warmup-epochs or --precision fp32; the same command goes "
        f"on from the last checkpoint, which is of an earlier step ({later}batches are the same)"
    )


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name, on the CPU."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
