"""The split of a fed step's time."""

import itertools
import time

import torch

from bench.fed_step import measure_fed_step


def test_the_time_of_a_step_is_split_where_it_is_spent() -> None:
    def load():
        for number in itertools.count():
            time.sleep(0.01)
            yield number

    made = []

    def step(micro_batches, lr: float) -> None:
        made.extend(micro_batches)
        time.sleep(0.03)

    split = measure_fed_step(step, load(), torch.device("cpu"), warmup=1, steps=4)  # type: ignore[arg-type]
    assert made == [0, 1, 2, 3, 4]
    assert 10 <= split.host_loading <= split.between < split.step
    assert 30 <= split.host_launching <= split.step
    assert (split.idle_starts, split.steps) == (4, 4)
    assert "idle at 4 of 4 starts" in split.describe()
