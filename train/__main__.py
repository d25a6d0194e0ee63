"""Pretrain an encoder.

One process (a GPU if there is one, else the CPU's cores):

    python -m train --data URL --out RUN --method moco --recipe hp --encoder resnet50

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 -m train --data URL --out RUN ...

Two such machines, the same command on each; URL and RUN are the same on both:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        -m train --data URL --out RUN ...

The same command again goes on from the last checkpoint. `--config RUN/config.yaml` takes options
from a file; options beside it change single ones.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

from pipeline.recipes import RECIPES
from schemas import UserError
from schemas.cli import parse, run, take
from train.config import TrainConfig
from train.config_io import load
from train.trainer import train
from train.methods import METHODS, find_method
from train.presets import PRESETS, starting_point
from train.process_group import session


def main() -> None:
    config = options(sys.argv[1:])
    with session(config.rank_timeout, config.device):
        train(config)


def options(argv: list[str]) -> TrainConfig:
    """The command line; every rank reads the same one, and rank 0 alone speaks of it."""
    arguments = list(argv)
    path = take(arguments, "--config")
    named: dict[str, Mapping[str, Any]] = {"preset": PRESETS, "method": METHODS, "recipe": RECIPES}
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(silence))
            stack.enter_context(redirect_stderr(silence))
            try:
                return read(arguments, path, named)
            except UserError as error:
                raise SystemExit(2) from error
        return read(arguments, path, named)


def read(
    arguments: list[str], path: str | None, named: dict[str, Mapping[str, Any]]
) -> TrainConfig:
    file = None if path is None else load(path)
    return parse(
        TrainConfig,
        arguments,
        named=named,
        by_path={"method": find_method},
        start=partial(starting_point, file=file),
    )


def start() -> None:
    run(main, outlives_reader=True, decodes=True)


if __name__ == "__main__":
    start()
