"""The Ray Data job over shard plans: resume, bounded attempts, merging of the tables."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow.compute as pc
import ray
import ray.data
from ray import cloudpickle

from precompute.cluster import cluster, start_beside_driver
from precompute.encode import Resize
from precompute.estimators import EstimatorOptions
from precompute.plan import Plan
from precompute.progress import watch
from precompute.progress_actor import ProgressActor
from precompute.resume import missing_shards
from precompute.sources import Source
from precompute.stored_plan import PLAN_FOLDER
from precompute.worker import BuilderFactory, ShardActor
from schemas.cli import TerminatedError, loaded_files
from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.settings import defaults_of
from schemas.storage import Store
from schemas.tables import CARD, SHARD_FOLDER, DatasetCard, Reject, shard_name
from schemas.writer import PACKAGES, finish_dataset

STATS = "stats.json"


@dataclass(frozen=True)
class Job:
    """One precompute job, resolved: nothing in it depends on the machine that runs it.

    Attributes:
        name, split: for the card.
        source: where the images are.
        plan: which image goes into which shard.
        rejects: what the listing of the source rejected.
        estimator: options of the estimator.
        seed: of the plan.
        out: folder of the dataset, a plain path or any fsspec URL.
        batch_size: images that are decoded and estimated together.
        resize: what is made smaller before it is written.
        before: the dataset that the plan's shards are added to; None for a new one.
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
        """Of the plan of all shards, with those that were there before."""
        if self.before is None:
            return self.plan.digest
        return hashlib.sha256(f"{self.before.plan} {self.plan.digest}".encode()).hexdigest()

    def settings(self, weights_sha256: str | None) -> dict[str, Any]:
        """What the shards depend on: another run may add to them only if all of it is the same."""
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
        return json.loads(json.dumps(settings))  # as a marker gives them back: tuples are lists

    @property
    def default_settings(self) -> dict[str, Any]:
        """What a setting counts as that a marker of an older version does not know."""
        resize = Resize()
        return {
            "resize": resize.short_side,
            "resize_quality": resize.quality,
            "first_shard": 0,
            "estimator": defaults_of(type(self.estimator)),
        }


class Usable(NamedTuple):
    """The CPU cores and GPUs that workers can have: of all nodes, and cores of the largest one."""

    cores: float
    devices: float
    node_cores: float


def usable_resources(nodes: Sequence[Mapping[str, Any]]) -> Usable:
    """Return what workers can have of a cluster.

    Where there are GPUs, workers go to nodes with GPUs only, and each has an even share of cores:
    that of the node with the fewest cores per GPU, as a worker must fit on any of them.

    Args:
        nodes: as `ray.nodes` returns them.
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


MOST_WORKERS_PER_GPU = 3
CORES_PER_WORKER = 2
"""A worker reads, decodes, estimates and packs in threads of their own (both numbers are ours)."""


def workers_per_gpu(cores_per_gpu: float) -> int:
    """Return how many workers share a GPU by default.

    One process cannot keep a GPU busy: what is left to its CPU is one Python process's work (see
    docs/performance.md), and the GPU waits at the begin and the end of each shard.
    """
    return max(1, min(MOST_WORKERS_PER_GPU, int(cores_per_gpu // CORES_PER_WORKER)))


@dataclass(frozen=True)
class Resources:
    """What the job may take of a cluster.

    Attributes:
        address: of a running Ray cluster; None for a local one that ends with the job.
        workers: shards at a time; 0 for as many as the cluster's GPUs, or CPU cores, allow.
        cpus: cores of each worker; 0 for an even share of what the cluster has.
        gpus: GPUs of each worker; 0 for a part of one, see `workers_per_gpu`.
    """

    address: str | None = None
    workers: int = 0
    cpus: float = 0
    gpus: float = 0

    def split(
        self, cores: float, devices: float, shards: int, node_cores: float = math.inf
    ) -> tuple[int, float, float]:
        """Return the count of workers, and the cores and GPUs of each.

        Args:
            cores, devices: CPU cores and GPUs of the cluster.
            shards: how many are to be built.
            node_cores: cores of the largest node; a worker does not reach over two.

        Raises:
            UserError: a worker is to have more than the cluster has.
        """
        if self.gpus > devices or self.cpus > min(cores, node_cores):
            raise UserError(
                f"a worker is to have {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has "
                f"{cores:g} and {devices:g}, its largest node {min(cores, node_cores):g} CPUs"
            )
        if self.gpus:
            fitting = devices // self.gpus
        elif devices:
            fitting = devices * workers_per_gpu(cores / devices)
        else:
            fitting = cores // (self.cpus or 1)
        workers = max(1, min(self.workers or int(fitting), shards))
        # Ray puts workers that fit together onto one GPU, so each asks for the part that spreads
        # them over all GPUs; Ray keeps such parts as ten-thousandths
        even = math.floor(10_000 / math.ceil(workers / devices)) / 10_000 if devices else 0.0
        # more workers than cores share them
        gpus = min(self.gpus or even, devices / workers if self.gpus else 1.0)
        return workers, self.cpus or min(cores / workers, node_cores), gpus


@dataclass(frozen=True)
class Summary:
    """What a run of the job did.

    Attributes:
        shards, images: that were missing before.
        seconds: from start to end.
        at_work: seconds from the first shard's begin to the last one's end: without the start of
            Ray and of its workers.
    """

    dataset: ShardDataset
    shards: int
    images: int
    seconds: float
    at_work: float

    def stats(self) -> dict[str, Any]:
        """What `stats.json` says, of the run and of the dataset."""
        dataset = self.dataset
        share = mean_foreground(dataset)
        return {
            "run": {
                "images": self.images,
                "shards": self.shards,
                "seconds": round(self.seconds, 1),
                "seconds_at_work": round(self.at_work, 1),
                "images_per_second_at_work": round(self.images / max(self.at_work, 1e-9), 2),
            },
            "dataset": {
                "samples": len(dataset),
                "shards": len(dataset.shards),
                "bytes": sum(row.bytes for row in dataset.shards),
                "rejects": dict(Counter(dataset.rejects["reason"].to_pylist()).most_common()),
                "foreground": None if share is None else round(share, 4),
            },
        }


def mean_foreground(dataset: ShardDataset) -> float | None:
    """Return the mean share of foreground cells over all samples; None if no sample has one."""
    total, count = 0.0, 0
    for batch in dataset.samples.batches(["foreground"]):
        shares = batch.column(0)
        total += pc.sum(shares).as_py() or 0.0
        count += len(shares) - shares.null_count
    return total / count if count else None


def run_job(job: Job, resources: Resources) -> Summary:
    """Do what is missing of a job, then write the tables and the card.

    Raises:
        UserError: the output has other settings or another format version, cannot be written, or a
            shard keeps failing.
    """
    start = time.monotonic()
    store = Store(job.out)
    # Loaded here too, so that weights that are wrong or missing are found before Ray is started; on
    # the CPU, because the driver's context would stay on the GPU for the whole job, and a GPU in
    # exclusive-process mode would take no worker beside it.
    estimator = job.estimator.build(device="cpu")
    settings = job.settings(estimator.weights_sha256)
    card = None
    if store.exists(CARD):  # of a newer format its shards would look damaged, and be written over
        card = DatasetCard.from_json(store.read(CARD), store.location(CARD))
    missing = missing_shards(store, settings, job.default_settings)
    store.make_folder(SHARD_FOLDER)
    at_work = 0.0
    if missing:
        at_work = build_shards(job, settings, missing, resources)
    elif card and card.plan == job.plan_digest:
        return Summary(ShardDataset.open(job.out), 0, 0, time.monotonic() - start, at_work)
    dataset = finish_dataset(
        store,
        job.first_shard + len(job.plan.shards),
        name=job.name,
        split=job.split,
        classes=job.source.classes,
        saliency_side=estimator.side,
        estimator=settings["estimator"],
        plan=job.plan_digest,
        seed=job.seed,
        rejects=job.rejects,
        packages=(*PACKAGES, "ray", "torch", "torchvision", "nvidia-dali-cuda130"),
    )
    images = sum(job.plan.size(shard - job.first_shard) for shard in missing)
    summary = Summary(dataset, len(missing), images, time.monotonic() - start, at_work)
    store.remove_folder(PLAN_FOLDER)  # of this run, and of any that was killed
    store.write(STATS, (json.dumps(summary.stats(), indent=2) + "\n").encode())
    return summary


def build_shards(
    job: Job, settings: dict[str, Any], missing: list[int], resources: Resources
) -> float:
    """Build the missing shards, as many at a time as there are workers. Raises UserError.

    Returns:
        seconds from the first shard's begin to the last one's end.
    """
    first, plan = job.first_shard, job.plan
    images = sum(plan.size(shard - first) for shard in missing)
    store = Store(job.out)
    for module in loaded_files():  # a source of the user's own, named by its file
        cloudpickle.register_pickle_by_value(module)

    def so_far() -> str:
        there = store.sizes(SHARD_FOLDER)
        done = sum(shard_name(shard, "parquet").split("/")[1] in there for shard in missing)
        return (
            f"{done} of {len(missing)} missing shards are written; run the same command again to "
            "resume"
        )

    with cluster(resources.address):
        cores, devices, node_cores = usable_resources(ray.nodes())
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
        progress = start_beside_driver(ProgressActor)
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
                        raise UserError(f"shard {row['shard']} failed: {row['error']}; {so_far()}")
            return ray.get(progress.at_work.remote())
        except TerminatedError as error:
            raise TerminatedError(f"terminated; {so_far()}") from error
        except ray.exceptions.RayError as error:
            raise UserError(f"Ray failed: {str(error).splitlines()[0]}; {so_far()}") from error
