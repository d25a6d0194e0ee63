"""python -m schemas verify|info URL"""

import tyro

from schemas.cli import program, run
from schemas.dataset import ShardDataset
from schemas.info import describe


def verify(url: tyro.conf.Positional[str], /, workers: int = 4) -> int:
    """Compare every byte of a dataset with its tables. Exit status 1 when something is wrong.

    Args:
        url: The dataset's folder, a plain path or any fsspec URL.
        workers: Shards read at a time; each is held in memory whole.
    """
    report = ShardDataset.open(url).verify(workers)
    print(report)
    return 0 if report.clean else 1


def info(url: tyro.conf.Positional[str], /) -> int:
    """Print what is in a dataset: counts, classes, bytes, rejects, samples a shard.

    Args:
        url: The dataset's folder, a plain path or any fsspec URL.
    """
    print(describe(ShardDataset.open(url)))
    return 0


def main() -> int:
    return tyro.extras.subcommand_cli_from_dict({"verify": verify, "info": info}, prog=program())


def start() -> None:
    run(main)


if __name__ == "__main__":
    start()
