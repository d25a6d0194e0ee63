"""Train under torchrun, note which samples each rank is fed, and optionally die.

python tests/train/elastic_run.py NOTES STOP OPTIONS...: NOTES is a folder; after STOP steps (0:
never) each rank ends at once, as killed processes do.
"""

import json
import os
import sys
from pathlib import Path

from pipeline import MaskedViews
from tests.train.ranks import add_tiny_encoders
from train import __main__ as command
from train.trainer import MetricsBuffer

notes, stop = Path(sys.argv[1]), int(sys.argv[2])
next_batch, add = MaskedViews._next, MetricsBuffer.add


def noting(views):
    place = [views.epoch, views.step, views.rank, views.world_size]
    batch = next_batch(views)
    with (notes / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps([*place, batch.sample_keys]) + "\n")
    return batch


def dying(meter, scalars, waited, **known):
    add(meter, scalars, waited, **known)
    if known["step"] == stop + 1:  # the checkpoint of step `stop` is written
        os._exit(9)


MaskedViews._next = noting
if stop:
    MetricsBuffer.add = dying
add_tiny_encoders()
sys.argv = ["train", *sys.argv[3:]]
command.start()
