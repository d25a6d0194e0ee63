"""Plan on a Ray cluster: Ray Data lists and shuffles the images, tasks complete the buckets."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray import cloudpickle

from precompute import plan_stages as stages
from precompute.bucket_plan import PartGroup, StoredListing, plan_in_buckets
from precompute.progress import watch_count
from precompute.progress_actor import CountActor
from precompute.ray_cluster import start_on_driver_node
from precompute.sources import Source
from schemas.cli import TerminatedError, list_loaded_files
from schemas.errors import UserError

R = TypeVar("R")

IN_FLIGHT_PER_CORE = 2
"""Maximum number of submitted and unfinished tasks per CPU core."""
PARTITIONS_PER_CORE = 4
MIN_PARTITIONS = 8


def plan_on_cluster(
    source: Source, plan_folder: str, *, seed: int, shard_samples: int, limit: int | None = None
) -> StoredListing:
    """List a source and plan its shards by tasks of the connected Ray cluster.

    Args:
        The arguments are those of `plan_in_buckets`.

    Raises:
        UserError: the source or Ray fails.
        TerminatedError: on SIGTERM.
    """
    for module in list_loaded_files():  # workers cannot import a custom source's file by its name
        cloudpickle.register_pickle_by_value(module)
    try:
        return plan_in_buckets(
            source, plan_folder, RayRunner(), seed=seed, shard_samples=shard_samples, limit=limit
        )
    except ray.exceptions.RayError as error:
        if (cause := unwrap_user_error(error)) is not None:
            # Ray Data adds lines about retries to the message of a task's exception
            raise UserError(str(cause).splitlines()[0]) from error
        raise UserError(f"planning failed: {str(error).splitlines()[-1]}") from error
    except TerminatedError as error:
        raise TerminatedError(
            "terminated while the images were listed; run the same command again"
        ) from error


def unwrap_user_error(error: BaseException) -> UserError | None:
    """Return the UserError that a task raised, unwrapped from Ray's exceptions, if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return None


class RayRunner:
    """Runs the steps of a plan on the connected cluster."""

    def __init__(self) -> None:
        self.cores = int(ray.cluster_resources().get("CPU", 1))

    def shuffle(
        self, source: Source, groups: list[PartGroup], plan_folder: str, seed: int, buckets: int
    ) -> set[str]:
        """Implement `Runner.shuffle` with Ray Data."""
        # as JSON, because file names need not be valid UTF-8
        items = [{"first": first, "parts": json.dumps(parts)} for first, parts in groups]
        counter = start_on_driver_node(CountActor)
        rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            partial(list_group, source=source, seed=seed, buckets=buckets, counter=counter),
            batch_size=1,
            batch_format="pyarrow",
        )
        partitions = min(buckets, max(MIN_PARTITIONS, PARTITIONS_PER_CORE * self.cores))
        written = rows.groupby("bucket", num_partitions=partitions).map_groups(
            partial(stages.write_rows, plan_folder=plan_folder), batch_format="pyarrow"
        )
        with watch_count(counter):
            return {
                label for row in written.iter_rows() for label in json.loads(row["text_labels"])
            }

    def map(
        self,
        function: Callable[..., R],
        arguments: Iterable[tuple],
        max_in_flight: int | None = None,
    ) -> Iterator[R]:
        """Implement `Runner.map` with Ray tasks."""

        def call_function(*argument: Any) -> R:
            return function(*argument)

        call = ray.remote(num_cpus=1)(call_function)
        at_once = min(max_in_flight or math.inf, IN_FLIGHT_PER_CORE * self.cores)
        pending: deque[Any] = deque()
        for argument in arguments:
            pending.append(call.remote(*argument))
            if len(pending) >= at_once:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())


def list_group(
    group: pa.Table, source: Source, seed: int, buckets: int, counter: Any
) -> Iterator[pa.Table]:
    """Call `list_rows` for Ray Data, which passes groups of parts and takes tables of rows."""
    for row in group.to_pylist():
        parts = json.loads(row["parts"])
        for table in stages.list_rows(source, row["first"], parts, seed, buckets):
            infos = (
                pc.sum(pc.equal(table["bucket"], stages.number_infos_bucket(buckets))).as_py() or 0
            )
            counter.add.remote(len(table) - infos)
            yield table
