"""Test what `write_dataset` stores in the card."""

from collections.abc import Callable
from pathlib import Path

from schemas import Sample, write_dataset
from schemas.info import describe
from schemas.names import from_stored


def test_a_name_may_be_that_of_a_folder_in_another_encoding(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    name = "caf\udce9"  # as Python reads the name of a folder in Latin-1
    dataset = write_dataset(tmp_path, [make_sample(0)], name=name, split=name, classes=["a"])
    assert from_stored(dataset.name) == from_stored(dataset.card.split) == name
    assert describe(dataset).isascii()
