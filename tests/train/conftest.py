from collections.abc import Iterator
from pathlib import Path

import pytest

import train.trainer
from tests.train.ranks import Ranks, add_tiny_encoders
from tests.train.runs import config, write_images
from train.config import KnnConfig

add_tiny_encoders()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return write_images(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def run(shards, tmp_path_factory) -> Path:
    """Train a short run that is never stopped; other runs are compared with it."""
    out = tmp_path_factory.mktemp("run")
    knn = KnnConfig(data=shards, neighbors=(1, 5), epochs=1)
    train.trainer.train(config(shards, out, knn=knn))
    return out
