"""What runs in Ray's workers: a ShardBuilder, and how often a shard is tried."""

import json
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
from precompute.shard_builder import ShardBuilder
from precompute.sources import Source, SourceImage
from schemas.errors import UserError
from schemas.storage import Store

# A worker that dies takes its shard with it; Ray starts both again without end. Twice may be bad
# luck; before the third attempt the images that kill it are looked for.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class BuilderFactory:
    """What a worker needs to make its own ShardBuilder: no plan, no model, no open file."""

    source: Source
    estimator: EstimatorOptions
    out: str
    batch_size: int
    resize: Resize
    settings: dict[str, Any]
    threads: int

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
    """A ShardBuilder as Ray Data calls it: a plan in, a line about what happened out."""

    def __init__(self, make_builder: BuilderFactory, progress: Any):
        self.make_builder = make_builder
        self.builder = make_builder()
        self.progress = progress

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = int(row["shard"])
        images = [SourceImage(*image) for image in json.loads(row["images"])]
        return {"shard": shard, "error": self.build(shard, images)}

    def build(self, shard: int, images: list[SourceImage]) -> str:
        """Build one shard; why not, or an empty string."""
        attempt = ray.get(self.progress.begin.remote(shard))
        if attempt > MAX_ATTEMPTS:
            return f"its worker died {MAX_ATTEMPTS} times, and no image of it kills one alone"

        def advance(written: int, rejected: int) -> None:
            self.progress.advance.remote(shard, written, rejected)

        try:
            refused: Mapping[str, str] = {}
            if attempt == MAX_ATTEMPTS:
                refused = find_crashing_images(images, self.make_builder)
            self.builder.build(shard, images, advance, refused)
        except UserError as error:
            return str(error)
        except Exception as error:
            logging.getLogger(__name__).exception("shard %d", shard)
            return f"{type(error).__name__}: {error}"
        ray.get(self.progress.finish.remote(shard))
        return ""
