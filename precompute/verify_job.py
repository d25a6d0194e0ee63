"""python -m precompute.verify_job DATA --address HOST:6379

Verifies a dataset on a Ray cluster, as `python -m schemas verify` does on one machine.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray
import tyro
from tqdm import tqdm

from precompute.cluster import cluster
from schemas.cli import parse, run
from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.tables import ShardRow
from schemas.verify import Placed, VerifyOptions, VerifyReport, check_shard, verify_dataset
from schemas.verify_record import Problem

SHARDS_PER_TASK = 8
"""Shards that a task reads one after the other (ours): their rows lie together in one table."""
IN_FLIGHT_PER_CORE = 2

Checked = tuple[ShardRow, list[Problem]]


@dataclass(frozen=True)
class Options:
    """Compare every byte of a dataset with its tables, on a Ray cluster."""

    data: tyro.conf.Positional[str] = tyro.MISSING
    """Folder of the dataset, a plain path or any fsspec URL that all nodes can read."""
    address: str | None = None
    """Address of a running Ray cluster (`auto` for the one of this machine); by default a local one
    is started and ended."""
    shards: int | None = None
    """Verify only so many shards, drawn at random; by default all of them."""
    seed: int = 0
    """Random seed of --shards: another one draws other shards."""
    record: Path | None = None
    """File that notes the shards without a problem; with it, the same command goes on where an
    interrupted one stopped."""


def check_rows(url: str, rows: Sequence[Placed]) -> list[Checked]:
    """Check some shards of a dataset, one after the other.

    Args:
        rows: shards, each with the places where its rows of the table of samples begin and end.
    """
    dataset = ShardDataset.open(url)
    return [(row, list(check_shard(dataset, row, place))) for row, place in rows]


def check_on_cluster(url: str) -> Callable[[Sequence[Placed]], Iterator[Checked]]:
    """Return what checks shards by tasks of the connected cluster, and yields them in order."""

    def check(rows: Sequence[Placed]) -> Iterator[Checked]:
        call = ray.remote(num_cpus=1)(check_rows)
        most = max(2, int(IN_FLIGHT_PER_CORE * ray.cluster_resources().get("CPU", 1)))
        pending: deque[Any] = deque()
        left = iter(rows)
        while chunk := list(islice(left, SHARDS_PER_TASK)):
            pending.append(call.remote(url, chunk))
            if len(pending) >= most:
                yield from ray.get(pending.popleft())
        while pending:
            yield from ray.get(pending.popleft())

    return check


def verify_on_cluster(options: Options) -> VerifyReport:
    """Verify a dataset by the options.

    Raises:
        UserError: there is no dataset, the record is of another one, or Ray failed.
    """
    dataset = ShardDataset.open(options.data)
    how = VerifyOptions(shards=options.shards, seed=options.seed, record=options.record)
    url = dataset.store.location("")  # tasks have another current folder
    total = sum(row.samples for row in how.choose(dataset.shards))
    with cluster(options.address), tqdm(total=total, unit="sample", disable=None) as bar:
        try:
            return verify_dataset(dataset, how, bar.update, check_on_cluster(url))
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray failed: {str(error).splitlines()[-1]}") from error


def main() -> int:
    report = verify_on_cluster(parse(Options))
    print(report)
    return 0 if report.clean else 1


if __name__ == "__main__":
    run(main)
