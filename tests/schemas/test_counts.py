"""Test numbers with their nouns."""

import pytest

from schemas.counts import format_count


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
