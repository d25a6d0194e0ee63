"""Test names that are not UTF-8: `write_dataset` stores them, the commands print them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from schemas import Sample, write_dataset
from schemas.info import describe
from schemas.names import from_stored

NAME = "caf\udce9"  # as Python reads the name of a folder in Latin-1


def test_a_name_may_be_that_of_a_folder_in_another_encoding(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path, [make_sample(0)], name=NAME, split=NAME, classes=["a"])
    assert from_stored(dataset.name) == from_stored(dataset.card.split) == NAME
    assert describe(dataset).isascii()


def test_a_folder_in_another_encoding_is_printed(
    make_sample: Callable[..., Sample], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "d", [make_sample(0)], name="d", classes=["a"])
    folder = shutil.move(tmp_path / "d", tmp_path / NAME)
    for command, words in (("verify", "clean: 1 sample"), ("info", "d train, format version 1")):
        done = subprocess.run(
            [sys.executable, "-m", "schemas", command, folder],
            env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},  # as in the locale en_US.UTF-8
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"caf\\udce9: {words}" in done.stdout
