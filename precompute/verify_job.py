"""python -m precompute.verify_job DATA --address HOST:6379

Verify a dataset on a Ray cluster, as `saliency-shards verify` does on one machine.
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

from precompute.ray_cluster import connect_to_ray
from schemas.cli import parse, run
from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.tables import ShardRow
from schemas.verify import Placed, VerifyOptions, VerifyReport, check_shard, verify_dataset
from schemas.verify_record import Problem

SHARDS_PER_TASK = 8
"""Number of consecutive shards that one task reads (our choice); their rows are adjacent in the
table of samples."""
IN_FLIGHT_PER_CORE = 2

Checked = tuple[ShardRow, list[Problem]]


@dataclass(frozen=True)
class Options:
    """Compare every byte of a dataset with its tables, on a Ray cluster."""

    data: tyro.conf.Positional[str] = tyro.MISSING
    """Folder of the dataset, a plain path or any fsspec URL that all nodes can read."""
    address: str | None = None
    """Address of an existing Ray cluster (`auto` for the one on this machine); by default a local
    one is started for the job."""
    shards: int | None = None
    """Number of shards to verify, drawn at random; by default all are verified."""
    seed: int = 0
    """Random seed for drawing the shards of --shards."""
    record: Path | None = None
    """File that records the shards without problems; the same command then resumes after an
    interruption."""


def check_rows(url: str, rows: Sequence[Placed]) -> list[Checked]:
    """Check some shards of a dataset, one after the other.

    Args:
        rows: shards, each with the range of its rows in the table of samples.
    """
    dataset = ShardDataset.open_unchecked(url)
    return [(row, list(check_shard(dataset, row, place))) for row, place in rows]


def check_on_cluster(url: str) -> Callable[[Sequence[Placed]], Iterator[Checked]]:
    """Return a function that checks shards in tasks of the cluster and yields them in order."""

    def check(rows: Sequence[Placed]) -> Iterator[Checked]:
        call = ray.remote(num_cpus=1)(check_rows)
        max_in_flight = max(2, int(IN_FLIGHT_PER_CORE * ray.cluster_resources().get("CPU", 1)))
        pending: deque[Any] = deque()
        remaining_rows = iter(rows)
        while chunk := list(islice(remaining_rows, SHARDS_PER_TASK)):
            pending.append(call.remote(url, chunk))
            if len(pending) >= max_in_flight:
                yield from ray.get(pending.popleft())
        while pending:
            yield from ray.get(pending.popleft())

    return check


def verify_on_cluster(options: Options) -> VerifyReport:
    """Verify a dataset on a Ray cluster according to the options.

    Raises:
        UserError: there is no dataset, the record belongs to another one, or Ray failed.
    """
    dataset = ShardDataset.open_unchecked(options.data)
    how = VerifyOptions(shards=options.shards, seed=options.seed, record=options.record)
    url = dataset.store.location("")  # absolute, because tasks have another current folder
    total = sum(row.samples for row in how.choose(dataset.shards))
    with connect_to_ray(options.address), tqdm(total=total, unit="sample", disable=None) as bar:
        try:
            return verify_dataset(dataset, how, bar.update, check_on_cluster(url))
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray failed: {str(error).splitlines()[-1]}") from error


def main() -> int:
    report = verify_on_cluster(parse(Options))
    print(report.describe())
    return 0 if report.clean else 1


if __name__ == "__main__":
    run(main)
