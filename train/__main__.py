"""Pretrain an encoder.

One process (a GPU if there is one, else the CPU's cores):

    python -m train --data URL --out RUN --method moco --recipe hp --encoder resnet50

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 -m train --data URL --out RUN ...

Two such machines, the same command on each; URL and RUN are the same on both:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        -m train --data URL --out RUN ...

Run the same command again to resume from the last checkpoint. `--config RUN/config.yaml` reads
options from a file; options on the command line override those of the file.
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeline.recipes import RECIPES
from schemas.cli import parse, run, take
from train.config import TrainConfig
from train.config_io import load_config
from train.methods import METHODS, find_method
from train.presets import PRESETS, choose_defaults
from train.process_group import join_process_group, parse_on_all_ranks
from train.trainer import train


def main() -> None:
    config = parse_command_line(sys.argv[1:])
    with join_process_group(config.rank_timeout, config.device):
        train(config)


def parse_command_line(argv: list[str]) -> TrainConfig:
    """Parse the command line on every rank; see `parse_on_all_ranks`."""
    arguments = list(argv)
    path = take(arguments, "--config")
    return parse_on_all_ranks(partial(parse_options, arguments, path))


def parse_options(arguments: list[str], path: str | None) -> TrainConfig:
    """Parse options; those that are not given come from the file at `path` or from a preset."""
    named: dict[str, Mapping[str, Any]] = {"preset": PRESETS, "method": METHODS, "recipe": RECIPES}
    file = None if path is None else load_config(path)
    return parse(
        TrainConfig,
        arguments,
        named=named,
        by_path={"method": find_method},
        start=partial(choose_defaults, file=file),
        shown={
            "config": ("FILE", "YAML file of options; those on the command line override them.")
        },
    )


def start() -> None:
    run(main, outlives_reader=True, decodes=True, resumes=True)


if __name__ == "__main__":
    start()
