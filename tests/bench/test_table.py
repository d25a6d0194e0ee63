"""Test how rates are measured and shown."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import loader, map_sides, precompute, remote, table, train
from bench.table import Row, Way, format_table, list_rates, measure, write
from schemas import UserError


def test_ways_are_measured_in_turn_after_one_run_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(table, "wait_until_quiet", lambda: None)  # other tests run now
    calls: list[str] = []

    def way(name: str) -> int:
        calls.append(name)
        return 7

    ways = {
        "a": Way(lambda: way("a"), lambda: calls.append("-")),
        "b": Way(lambda: way("b")),
    }
    rows = measure(ways, repeats=3)
    assert "".join(calls) == "ab" + "-ab-ab-ab"
    assert [(row.name, len(row.rates)) for row in rows] == [("a", 3), ("b", 3)]
    assert all(rate > 0 for row in rows for rate in row.rates)


def test_a_table_shows_median_spread_and_ratio() -> None:
    text = format_table(
        "T", [Row("slow", [10, 30, 20]), Row("fast", [40, 50, 60])], {"fast": "slow"}
    )
    assert "| slow | 20.0 | 10.0 .. 30.0 |  |" in text
    assert "| fast | 50.0 | 40.0 .. 60.0 | 2.50 x slow |" in text


def test_what_is_written_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bench.json"
    write(path, {"batch_size": 32, "out": path}, list_rates("T", [Row("way", [1.234, 5.678])]))
    content = json.loads(path.read_text())
    assert content["images_per_second"] == {"T": {"way": [1.23, 5.68]}}
    assert content["settings"] == {"batch_size": 32, "out": str(path)}
    assert content["machine"]["cores"] >= 1
    assert "torch" in content["machine"]["versions"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (loader.Options, "repeats"),
        (loader.Options, "batch_size"),
        (precompute.Options, "repeats"),
        (precompute.Options, "images"),
        (remote.Options, "repeats"),
        (remote.Options, "epochs"),
        (train.Options, "repeats"),
        (map_sides.SideOptions, "crops"),
    ],
)
def test_counts_of_nothing_are_refused(options: type[Any], name: str) -> None:
    """They would end in a division by zero, or in a median of nothing, after the work."""
    flag = name.replace("_", "-")
    with pytest.raises(UserError, match=f"--{flag} 0: must be at least 1"):
        options(**{name: 0})
