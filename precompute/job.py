"""Run a precompute job on Ray Data: build the missing shards, then write tables and card."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import ray.data
from ray import cloudpickle

from precompute.estimators import Estimator, EstimatorOptions
from precompute.output_lock import lock_output
from precompute.plan import Plan
from precompute.progress import watch
from precompute.progress_actor import ProgressActor
from precompute.ray_cluster import connect_to_ray, start_on_driver_node
from precompute.reencode import Resize
from precompute.resume import find_missing_shards, refuse_shard_of_other_job
from precompute.sources import Source
from precompute.summary import STATS, Summary, write_stats
from precompute.worker import BuilderFactory, ShardActor
from schemas.cli import TerminatedError, list_loaded_files
from schemas.dataset import ShardDataset, read_card
from schemas.errors import UserError
from schemas.settings import defaults_of
from schemas.storage import Store
from schemas.tables import (
    CARD,
    MERGED_SAMPLES,
    REJECTS,
    SAMPLES,
    SHARD_FOLDER,
    SHARDS,
    DatasetCard,
    Reject,
    shard_name,
)
from schemas.writer import PACKAGES, finish_dataset


@dataclass(frozen=True)
class Job:
    """A complete description of a precompute job, independent of the machine that runs it.

    Attributes:
        name, split: name and split of the dataset, for its card.
        source: the source of the images.
        plan: assignment of the images to shards.
        rejects: inputs rejected while the source was listed.
        estimator: options of the estimator.
        seed: random seed of the plan.
        out: folder of the dataset, a plain path or any fsspec URL.
        batch_size: number of images decoded and estimated together.
        resize: options for shrinking large images.
        before: card of the dataset that the plan's shards extend; None for a new one.
    """

    name: str
    split: str
    source: Source
    plan: Plan
    rejects: list[Reject]
    estimator: EstimatorOptions
    seed: int
    out: str
    batch_size: int
    resize: Resize = field(default_factory=Resize)
    before: DatasetCard | None = None

    @property
    def first_shard(self) -> int:
        return self.before.shards if self.before else 0

    @property
    def plan_digest(self) -> str:
        """Digest of the plan of all shards, including those of the dataset that is extended."""
        if self.before is None:
            return self.plan.digest
        return hashlib.sha256(f"{self.before.plan} {self.plan.digest}".encode()).hexdigest()

    def settings(self, weights_sha256: str | None) -> dict[str, Any]:
        """Return everything that the shards depend on; a job resumes only if all of it agrees."""
        settings = {
            "name": self.name,
            "split": self.split,
            "seed": self.seed,
            "images": self.plan.images,
            "shards": len(self.plan.shards),
            "plan": self.plan.digest,
            "batch_size": self.batch_size,
            "estimator": {**self.estimator.parameters(), "weights_sha256": weights_sha256},
        }
        if self.resize.short_side is not None:
            settings |= {"resize": self.resize.short_side, "resize_quality": self.resize.quality}
        if self.before is not None:
            settings["first_shard"] = self.first_shard
        return json.loads(json.dumps(settings))  # as read from a marker: tuples become lists

    def finish(
        self,
        store: Store,
        settings: dict[str, Any],
        saliency_side: int,
        before_card: Callable[[ShardDataset], None] | None = None,
    ) -> ShardDataset:
        """Write the tables and the card of a dataset whose shards are all written.

        Args:
            settings: what `settings` returns.
            before_card: see `finish_dataset`.

        Raises:
            UserError: two samples have the same key, or another job has written some of the shards.
        """
        return finish_dataset(
            store,
            self.first_shard + len(self.plan.shards),
            name=self.name,
            split=self.split,
            classes=self.source.classes,
            saliency_side=saliency_side,
            estimator=settings["estimator"],
            plan=self.plan_digest,
            seed=self.seed,
            rejects=self.rejects,
            packages=(*PACKAGES, "ray", "torch", "torchvision", "nvidia-dali-cuda130"),
            check_marker=lambda marker: refuse_shard_of_other_job(
                store, marker, settings, self.default_settings
            ),
            before_card=before_card,
        )

    @property
    def default_settings(self) -> dict[str, Any]:
        """Values to assume for settings that are missing from an older version's markers."""
        resize = Resize()
        return {
            "resize": resize.short_side,
            "resize_quality": resize.quality,
            "first_shard": 0,
            "estimator": defaults_of(type(self.estimator)),
        }


class Usable(NamedTuple):
    """Hardware that workers can use.

    Attributes:
        cores: CPU cores that workers can use, of all nodes together.
        devices: GPUs of all nodes together.
        node_cores: CPU cores of the largest node that workers can use.
    """

    cores: float
    devices: float
    node_cores: float


def find_usable_resources(nodes: Sequence[Mapping[str, Any]]) -> Usable:
    """Return the part of a cluster's hardware that workers can use.

    If there are GPUs, workers run only on nodes with GPUs, and each gets an even share of the
    cores. The share is that of the node with the fewest cores per GPU, because a worker must fit
    on any of these nodes.

    Args:
        nodes: the result of `ray.nodes`.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    usable = [node for node in alive if node.get("GPU", 0) > 0]
    devices = sum(node["GPU"] for node in usable)
    if usable:
        cores = devices * min(node.get("CPU", 0) / node["GPU"] for node in usable)
    else:
        usable = alive
        cores = sum(node.get("CPU", 0) for node in usable)
    return Usable(cores or 1, devices, max(node.get("CPU", 0) for node in usable) or 1)


MAX_WORKERS_PER_GPU = 3
CORES_PER_WORKER = 2
"""CPU cores per worker, in which reading, decoding, estimating and packing run in separate threads
(both numbers are our choice)."""


def choose_workers_per_gpu(cores_per_gpu: float) -> int:
    """Return how many workers share a GPU by default.

    A single process cannot keep a GPU busy: its CPU work runs in one Python process (see
    docs/performance.md), and the GPU waits at the beginning and the end of each shard.
    """
    return max(1, min(MAX_WORKERS_PER_GPU, int(cores_per_gpu // CORES_PER_WORKER)))


@dataclass(frozen=True)
class Resources:
    """Hardware that the job may use.

    Attributes:
        address: address of an existing Ray cluster; None for a local one that ends with the job.
        workers: number of shards built at the same time; 0 for as many as the cluster's GPUs, or
            CPU cores, allow.
        cpus: CPU cores per worker; 0 for an even share of the cluster's.
        gpus: GPUs per worker; 0 for a fraction of one, see `choose_workers_per_gpu`.
    """

    address: str | None = None
    workers: int = 0
    cpus: float = 0
    gpus: float = 0

    def split(
        self, cores: float, devices: float, shards: int, node_cores: float = math.inf
    ) -> tuple[int, float, float]:
        """Return the number of workers, and the CPU cores and GPUs of each.

        Args:
            cores, devices: CPU cores and GPUs of the cluster.
            shards: number of shards to build.
            node_cores: CPU cores of the largest node; a worker cannot span two nodes.

        Raises:
            UserError: a worker requests more than the cluster has.
        """
        if self.gpus > devices or self.cpus > min(cores, node_cores):
            raise UserError(
                f"each worker requests {self.cpus:g} CPUs and {self.gpus:g} GPUs, but the cluster "
                f"has {cores:g} and {devices:g}, its largest node {min(cores, node_cores):g} CPUs"
            )
        if self.gpus:
            fitting = devices // self.gpus
        elif devices:
            fitting = devices * choose_workers_per_gpu(cores / devices)
        else:
            fitting = cores // (self.cpus or 1)
        workers = max(1, min(self.workers or int(fitting), shards))
        # Ray packs onto one GPU all workers that fit, so each requests the fraction that spreads
        # them over all GPUs. Ray stores fractions as ten-thousandths, so it is rounded down.
        even = math.floor(10_000 / math.ceil(workers / devices)) / 10_000 if devices else 0.0
        # if there are more workers than the hardware allows for, each gets an even share
        gpus = min(self.gpus or even, devices / workers if self.gpus else 1.0)
        return workers, self.cpus or min(cores / workers, node_cores), gpus


def run_job(job: Job, resources: Resources) -> Summary:
    """Build the missing shards of a job, then write the tables and the card.

    Raises:
        UserError: the output has other settings or another format version, cannot be written or is
            being written by another job, or a shard keeps failing.
    """
    start = time.monotonic()
    # The driver loads the weights too, so that wrong or missing weights are noticed before Ray is
    # started. It does so on the CPU, because its context would stay on the GPU for the whole job,
    # and a GPU in exclusive-process mode would then accept no worker.
    estimator = job.estimator.build(device="cpu")
    with lock_output(Store(job.out)):
        return build_dataset(job, resources, estimator, start)


def build_dataset(job: Job, resources: Resources, estimator: Estimator, start: float) -> Summary:
    """Do the work of `run_job`, as the only job in the output folder.

    Args:
        start: when the run began, by `time.monotonic`.
    """
    store = Store(job.out)
    settings = job.settings(estimator.weights_sha256)
    card = None
    if store.exists(CARD):  # shards of a newer format would look damaged and be overwritten
        card = read_card(store)
    missing = find_missing_shards(store, settings, job.default_settings)
    store.make_folder(SHARD_FOLDER)
    at_work = 0.0
    if missing:
        at_work = build_shards(job, settings, missing, resources)

    def summarize(dataset: ShardDataset, has_written: bool = True) -> Summary:
        images = sum(job.plan.size(shard - job.first_shard) for shard in missing)
        seconds = time.monotonic() - start
        return Summary(dataset, len(missing), images, seconds, at_work, has_written)

    if not missing and card and card.plan == job.plan_digest and has_tables(store, card):
        has_stats = store.exists(STATS)
        summary = summarize(ShardDataset.open(job.out), has_written=not has_stats)
        if not has_stats:
            write_stats(store, summary)
        return summary
    dataset = job.finish(
        store,
        settings,
        estimator.side,
        before_card=lambda dataset: write_stats(store, summarize(dataset)),
    )
    return summarize(dataset)


def has_tables(store: Store, card: DatasetCard) -> bool:
    """Return whether all tables of a dataset exist; one may have been lost."""
    names = [SHARDS, REJECTS, *([SAMPLES] if card.samples <= MERGED_SAMPLES else [])]
    return all(map(store.exists, names))


def build_shards(
    job: Job, settings: dict[str, Any], missing: list[int], resources: Resources
) -> float:
    """Build the missing shards, one per worker at a time. Raises UserError.

    Returns:
        seconds from the start of the first shard to the end of the last one.
    """
    first, plan = job.first_shard, job.plan
    images = sum(plan.size(shard - first) for shard in missing)
    store = Store(job.out)
    for module in list_loaded_files():  # workers cannot import a custom source's file by its name
        cloudpickle.register_pickle_by_value(module)

    def count_done() -> str:
        files = store.sizes(SHARD_FOLDER)
        done = sum(shard_name(shard, "parquet").split("/")[1] in files for shard in missing)
        return (
            f"{done} of {len(missing)} missing shards are written; run the same command again to "
            "resume"
        )

    with connect_to_ray(resources.address):
        cores, devices, node_cores = find_usable_resources(ray.nodes())
        workers, cpus, gpus = resources.split(cores, devices, len(missing), node_cores)
        factory = BuilderFactory(
            source=job.source,
            estimator=job.estimator,
            out=job.out,
            batch_size=job.batch_size,
            resize=job.resize,
            settings=settings,
            threads=max(1, int(cpus)),
            plan=plan.for_workers(),
            first_shard=first,
        )
        progress = start_on_driver_node(ProgressActor)
        plans = [{"shard": shard, "images": plan.message(shard - first)} for shard in missing]
        results = ray.data.from_items(plans, override_num_blocks=len(plans)).map(
            ShardActor,
            fn_constructor_args=(factory, progress),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus or None,
        )

        try:
            with watch(progress, images, len(missing)):
                for row in results.iter_rows():
                    if row["error"]:
                        raise UserError(
                            f"shard {row['shard']} failed: {row['error']}; {count_done()}"
                        )
            return ray.get(progress.at_work.remote())
        except TerminatedError as error:
            raise TerminatedError(f"terminated; {count_done()}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray failed: {str(error).splitlines()[0]}; {count_done()}") from error
