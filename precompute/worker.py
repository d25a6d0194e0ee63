"""Build shards in a worker of Ray: the actor, and how often a shard is tried."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nvidia.dali.experimental.dynamic as ndd
import ray
import torch

from precompute.crash_bisect import find_crashing_images
from precompute.encode import Resize
from precompute.estimators import EstimatorOptions
from precompute.plan import Plan
from precompute.reads import reported
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage
from schemas.errors import UserError
from schemas.storage import Store

# A worker that dies takes its shard with it; Ray starts both again without end. Twice may be bad
# luck; before the third attempt the images that kill it are looked for.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class BuilderFactory:
    """What a worker needs to make its own ShardBuilder: no images, no model, no open file.

    Attributes:
        plan: of `Plan.for_workers`; None where the images are handed over.
        first_shard: number of the plan's first shard.
    """

    source: Source
    estimator: EstimatorOptions
    out: str
    batch_size: int
    resize: Resize
    settings: dict[str, Any]
    threads: int
    plan: Plan | None = None
    first_shard: int = 0

    def __call__(self) -> ShardBuilder:
        torch.set_num_threads(self.threads)
        ndd.set_num_threads(self.threads)
        return ShardBuilder(
            self.source,
            self.estimator.build(),
            Store(self.out),
            self.batch_size,
            self.resize,
            self.settings,
        )


class ShardActor:
    """A ShardBuilder as Ray Data calls it: a shard's plan in, an error or "" out."""

    def __init__(self, make_builder: BuilderFactory, progress: Any):
        self.make_builder = make_builder
        self.builder = make_builder()
        self.progress = progress

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard, factory = int(row["shard"]), self.make_builder
        assert factory.plan is not None
        images = factory.plan.images_of(shard - factory.first_shard, row["images"])
        return {"shard": shard, "error": self.build(shard, images)}

    def build(self, shard: int, images: list[SourceImage]) -> str:
        """Build one shard; why not, or an empty string."""
        attempt = ray.get(self.progress.begin.remote(shard))
        if attempt > MAX_ATTEMPTS:
            return f"its worker died {MAX_ATTEMPTS} times, and no image of it kills one alone"

        def advance(written: int, rejected: int) -> None:
            self.progress.advance.remote(shard, written, rejected)

        def report(slow: dict[str, float]) -> None:
            self.progress.report_reads.remote(shard, slow)

        try:
            refused: Mapping[str, str] = {}
            if attempt == MAX_ATTEMPTS:
                refused = find_crashing_images(images, self.make_builder)
            with reported(self.builder.reads, report):
                self.builder.build(shard, images, advance, refused)
        except UserError as error:
            return str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("shard %d", shard)
            return f"{type(error).__name__}: {error}"
        ray.get(self.progress.finish.remote(shard))
        return ""
