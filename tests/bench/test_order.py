"""The table of the time and memory that planning takes."""

import re
from typing import Any

import pytest

from bench import order
from bench.order import Options, build_table


def test_each_row_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak of memory includes that of earlier rows, so later ones seemed to need less."""
    calls: list[tuple[Any, ...]] = []

    def call(function: Any, *arguments: Any) -> Any:
        calls.append((function, *arguments))
        return function(*arguments)

    monkeypatch.setattr(order, "call_in_other_process", call)
    options = Options(shards=50, shard_samples=10, batch_size=20, streams=(1, 2))
    head, _, _, _, *rows = build_table(options).splitlines()
    assert head == "500 samples in 50 shards, batch 20, windows of 16 shards"
    assert calls == [(order.measure, options, streams) for streams in (1, 2)]
    for streams, row in zip((1, 2), rows, strict=True):
        assert re.fullmatch(rf"\| {streams} \| \d+\.\d\d \| \d+\.\d\d \| \d+ \|", row)
