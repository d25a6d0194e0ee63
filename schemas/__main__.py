"""Check or describe a dataset: python -m schemas verify|info URL."""

from pathlib import Path

import tyro

from schemas.cli import get_program_name, run
from schemas.dataset import ShardDataset
from schemas.info import describe
from schemas.verify import VerifyOptions, verify_dataset


def verify(
    url: tyro.conf.Positional[str],
    /,
    workers: int = 4,
    shards: int | None = None,
    seed: int = 0,
    record: Path | None = None,
) -> int:
    """Compare every byte of a dataset with its tables. The exit status is 1 if anything is wrong.

    Args:
        url: Folder of the dataset, a plain path or any fsspec URL.
        workers: Number of shards read in parallel; each is held in memory as a whole.
        shards: Number of shards to verify, drawn at random; by default all of them.
        seed: Random seed that draws the --shards; another seed draws other shards.
        record: File that records the shards verified without a problem; with it, the same command
            resumes an interrupted verification.
    """
    dataset = ShardDataset.open_unchecked(url)
    report = verify_dataset(dataset, VerifyOptions(workers, shards, seed, record))
    print(report)
    return 0 if report.clean else 1


def info(url: tyro.conf.Positional[str], /) -> int:
    """Print the content of a dataset: counts, classes, bytes, rejects, samples per shard.

    Args:
        url: Folder of the dataset, a plain path or any fsspec URL.
    """
    print(describe(ShardDataset.open(url)))
    return 0


def main() -> int:
    return tyro.extras.subcommand_cli_from_dict(
        {"verify": verify, "info": info}, prog=get_program_name()
    )


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
