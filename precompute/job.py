"""The Ray Data job over shard plans: resume, bounded attempts, progress, merge of the tables."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nvidia.dali.experimental.dynamic as ndd
import ray
import ray.data
import torch

from precompute.build import ShardBuilder
from precompute.estimators import EstimatorOptions
from precompute.plan import Plan
from precompute.progress import Ledger, watch
from precompute.resume import missing_shards
from precompute.sources import Source, SourceImage
from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.storage import Store
from schemas.tables import CARD, SHARD_FOLDER, DatasetCard, Reject
from schemas.writer import PACKAGES, finish_dataset

# A worker that dies takes its shard with it; Ray starts both again without end. After so many times
# it is not bad luck.
MAX_ATTEMPTS = 3


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

    def settings(self, weights_sha256: str | None) -> dict[str, Any]:
        """What the shards depend on: another run may add to them only if all of it is the same."""
        return {
            "name": self.name,
            "split": self.split,
            "seed": self.seed,
            "images": self.plan.images,
            "shards": len(self.plan.shards),
            "plan": self.plan.digest,
            "batch_size": self.batch_size,
            "estimator": {**self.estimator.parameters(), "weights_sha256": weights_sha256},
        }


@dataclass(frozen=True)
class Summary:
    """What a run of the job did: `images` in `seconds`, in `shards` that were missing before."""

    dataset: ShardDataset
    shards: int
    images: int
    seconds: float


def run_job(job: Job, workers: int, address: str | None) -> Summary:
    """Do what is missing of a job, then write the tables and the card.

    Args:
        workers: shards at a time; 0 for one a GPU, or one a CPU core where there is no GPU.
        address: of a running Ray cluster; None for a local one that ends with the job.

    Raises:
        UserError: the output has other settings or another format version, cannot be written, or a
            shard keeps failing.
    """
    start = time.monotonic()
    store = Store(job.out)
    # loaded here too, so that weights that are wrong or missing are found before Ray is started
    estimator = job.estimator.build()
    settings = job.settings(estimator.weights_sha256)
    if store.exists(CARD):  # of a newer format its shards would look damaged, and be written over
        DatasetCard.from_json(store.read(CARD), store.location(CARD))
    missing = missing_shards(store, settings)
    store.make_folder(SHARD_FOLDER)
    if missing:
        build_shards(job, settings, missing, workers, address)
    elif store.exists(CARD):
        return Summary(ShardDataset.open(job.out), 0, 0, time.monotonic() - start)
    dataset = finish_dataset(
        store,
        len(job.plan.shards),
        name=job.name,
        split=job.split,
        classes=job.source.classes,
        saliency_side=estimator.side,
        estimator=settings["estimator"],
        plan=job.plan.digest,
        seed=job.seed,
        rejects=job.rejects,
        packages=(*PACKAGES, "ray", "torch", "torchvision", "nvidia-dali-cuda130"),
    )
    images = sum(len(job.plan.shards[shard]) for shard in missing)
    return Summary(dataset, len(missing), images, time.monotonic() - start)


class ShardActor:
    """A ShardBuilder as Ray Data calls it: a plan in, a line about what happened out."""

    def __init__(self, make_builder: "BuilderFactory", ledger: Any, threads: int):
        torch.set_num_threads(threads)
        ndd.set_num_threads(threads)
        self.builder = make_builder()
        self.ledger = ledger

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = int(row["shard"])
        return {"shard": shard, "error": self.build(shard, json.loads(row["images"]))}

    def build(self, shard: int, images: list[list[Any]]) -> str:
        """Build one shard; why not, or an empty string."""
        if ray.get(self.ledger.begin.remote(shard)) > MAX_ATTEMPTS:
            return f"its worker died {MAX_ATTEMPTS} times"

        def advance(written: int, rejected: int) -> None:
            self.ledger.advance.remote(shard, written, rejected)

        try:
            self.builder.build(shard, [SourceImage(*image) for image in images], advance)
        except UserError as error:
            return str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("shard %d", shard)
            return f"{type(error).__name__}: {error}"
        return ""


@dataclass(frozen=True)
class BuilderFactory:
    """What a worker needs to make its own ShardBuilder: no plan, no model, no open file."""

    source: Source
    estimator: EstimatorOptions
    out: str
    batch_size: int
    settings: dict[str, Any]

    def __call__(self) -> ShardBuilder:
        estimator = self.estimator.build()
        return ShardBuilder(self.source, estimator, Store(self.out), self.batch_size, self.settings)


def build_shards(
    job: Job, settings: dict[str, Any], missing: list[int], workers: int, address: str | None
) -> None:
    """Build the missing shards, as many at a time as there are workers. Raises UserError."""
    images = {shard: job.plan.shards[shard] for shard in missing}
    factory = BuilderFactory(job.source, job.estimator, job.out, job.batch_size, settings)
    with cluster(address):
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cores = int(ray.cluster_resources().get("CPU", 1))
        workers = min(workers or gpus or cores, len(missing))
        threads = max(1, cores // workers)
        ledger = ray.remote(num_cpus=0)(Ledger).remote()
        plans = [{"shard": shard, "images": json.dumps(images[shard])} for shard in missing]
        results = ray.data.from_items(plans, override_num_blocks=len(plans)).map(
            ShardActor,
            fn_constructor_args=(factory, ledger, threads),
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=min(threads, cores / workers),  # more workers than cores share them
            num_gpus=min(1, gpus / workers) if gpus else None,
        )
        with watch(ledger, sum(map(len, images.values()))):
            for done, row in enumerate(results.iter_rows()):
                if row["error"]:
                    raise UserError(
                        f"shard {row['shard']} failed: {row['error']}; {done} of {len(missing)} "
                        "missing shards were written before, the same command goes on from there"
                    )


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A running Ray cluster, or a local one that ends with the block."""
    # Ray reports at length on itself; what concerns the job comes back in rows
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
