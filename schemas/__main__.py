"""Check or describe a dataset.

    saliency-shards verify URL   compare every byte with the tables
    saliency-shards info URL     print counts, classes, bytes and rejects

`--help` after a command lists its options. In a checkout `python -m schemas` is the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from schemas.cli import parse, run, run_subcommand
from schemas.dataset import ShardDataset
from schemas.info import describe
from schemas.verify import VerifyOptions, verify_dataset


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare every byte of a dataset with its tables.

    The exit status is 1 if anything is wrong.
    """

    url: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """Folder of the dataset, a plain path or any fsspec URL."""
    workers: int = 4
    """Number of shards read in parallel; each is held in memory as a whole."""
    shards: int | None = None
    """Number of shards to verify, drawn at random; by default all of them."""
    seed: int = 0
    """Random seed that draws the --shards; another seed draws other shards."""
    record: Path | None = None
    """File that records the shards verified without a problem; with it, the same command resumes an
    interrupted verification."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Print the content of a dataset: counts, classes, bytes, rejects, samples per shard."""

    url: Annotated[str, tyro.conf.Positional] = tyro.MISSING
    """Folder of the dataset, a plain path or any fsspec URL."""


def verify(argv: list[str]) -> int:
    options = parse(Verify, argv)
    dataset = ShardDataset.open_unchecked(options.url)
    report = verify_dataset(
        dataset, VerifyOptions(options.workers, options.shards, options.seed, options.record)
    )
    print(report.describe())
    return 0 if report.clean else 1


def info(argv: list[str]) -> int:
    print(describe(ShardDataset.open(parse(Info, argv).url)))
    return 0


def main() -> int | None:
    return run_subcommand({"verify": verify, "info": info}, __doc__)


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
