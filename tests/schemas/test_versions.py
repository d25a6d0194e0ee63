"""Versions in the records of datasets and runs."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from schemas import write_dataset
from schemas.versions import version_of


def test_the_version_is_the_installed_ones() -> None:
    assert version_of("numpy") == np.__version__


def test_a_dataset_is_written_by_a_checkout_that_is_not_installed(
    tmp_path: Path, make_sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version

    def version(package: str) -> str:
        if package == "saliency-shards":
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    dataset = write_dataset(tmp_path / "d", [make_sample(0)], name="d", classes=["a", "b", "c"])
    assert dataset.card.versions["saliency-shards"] == "not installed"
    assert dataset.card.versions["numpy"] == np.__version__
