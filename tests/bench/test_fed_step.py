"""The split of a fed step's time."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from bench import fed_step
from bench.fed_step import measure_fed_step


def test_the_time_of_a_step_is_split_where_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(fed_step, "time", SimpleNamespace(perf_counter=lambda: now))

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    def load():
        for number in itertools.count():
            pass_time(0.01)
            yield number

    made = []

    def step(micro_batches, lr: float) -> None:
        made.extend(micro_batches)
        pass_time(0.03)

    split = measure_fed_step(step, load(), torch.device("cpu"), warmup=1, steps=4)  # type: ignore[arg-type]
    assert made == [0, 1, 2, 3, 4]
    assert split.host_loading == pytest.approx(10)
    assert split.between == pytest.approx(10)
    assert split.host_launching == pytest.approx(30)
    assert split.step == pytest.approx(30)
    assert (split.idle_starts, split.steps) == (4, 4)
    assert "idle at 4 of 4 starts" in split.describe()
