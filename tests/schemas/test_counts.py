"""Test numbers with their nouns, and lists of names."""

import pytest

from schemas.counts import format_count, join_first


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (format_count(0, "shard"), "0 shards"),
        (format_count(1, "shard"), "1 shard"),
        (format_count(2, "shard"), "2 shards"),
        (format_count(1, "class", "classes"), "1 class"),
        (format_count(3, "class", "classes"), "3 classes"),
    ],
)
def test_one_is_singular(count: str, text: str) -> None:
    assert count == text


def test_only_the_first_names_are_listed() -> None:
    assert join_first([], 2) == ""
    assert join_first(["a", "b"], 2) == "a, b"
    assert join_first(["a", "b", "c", "d"], 2) == "a, b and 2 more"
