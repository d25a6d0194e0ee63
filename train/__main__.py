"""Pretrain an encoder.

One process (a GPU if there is one, else the CPU's cores):

    python -m train --data URL --out RUN --method moco --recipe hp --encoder resnet50

One machine with 8 GPUs:

    torchrun --nproc-per-node 8 -m train --data URL --out RUN ...

Two such machines, the same command on each; URL and RUN are the same on both:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        -m train --data URL --out RUN ...

The same command again goes on from the last checkpoint.
"""

from pipeline.recipes import RECIPES
from schemas.cli import parse, run
from train.config import TrainConfig
from train.distributed import session, together
from train.loop import train
from train.methods import METHODS


def main() -> None:
    methods = {name: method.Config() for name, method in METHODS.items()}
    with session():
        with together():
            config = parse(TrainConfig, named={"recipe": RECIPES, "method": methods})
        train(config)


if __name__ == "__main__":
    run(main)
