"""Build shards in a Ray worker: the actor, and the limit on attempts per shard."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

from precompute.crash_bisect import find_crashing_images
from precompute.estimators import EstimatorOptions
from precompute.plan import Plan
from precompute.reads import report_slow_reads
from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage
from precompute.threads import limit_torch_threads, use_threads
from schemas.errors import UserError
from schemas.storage import Store

# When a worker dies, Ray restarts it with the same shard, without limit. Two crashes may be
# a coincidence; before the third attempt, the images that crash the worker are searched for.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class BuilderFactory:
    """Creates the ShardBuilder of a worker; pickled, so it holds no images, model or open file.

    Attributes:
        threads: number of CPU threads for DALI, and for PyTorch unless the network is on a GPU.
        plan: the plan from `Plan.for_workers`; None if the images are passed directly.
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
        use_threads(self.threads)
        estimator = self.estimator.build()
        limit_torch_threads(estimator)
        return ShardBuilder(
            self.source,
            estimator,
            Store(self.out),
            self.batch_size,
            self.resize,
            self.settings,
        )


class ShardActor:
    """Adapts ShardBuilder to Ray Data: takes the plan of a shard, returns an error or ""."""

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
        """Build one shard; return the error message, or "" on success."""
        attempt = ray.get(self.progress.begin.remote(shard))
        if attempt > MAX_ATTEMPTS:
            return f"its worker crashed {MAX_ATTEMPTS} times, but no single image crashes it"

        def advance(written: int, rejected: int) -> None:
            self.progress.advance.remote(shard, written, rejected)

        def report(slow: dict[str, float]) -> None:
            self.progress.report_reads.remote(shard, slow)

        try:
            refused: Mapping[str, str] = {}
            if attempt == MAX_ATTEMPTS:
                refused = find_crashing_images(images, self.make_builder)
            with report_slow_reads(self.builder.reads, report):
                self.builder.build(shard, images, advance, refused)
        except UserError as error:
            return str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("shard %d", shard)
            return f"{type(error).__name__}: {error}"
        ray.get(self.progress.finish.remote(shard))
        return ""
