"""ShardBuilder: read, check, estimate and write one shard. Runs inside a Ray actor."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from precompute.decode import EncodedImage, RejectedError, check, decode
from precompute.estimators import Estimator
from precompute.sources import Source, SourceImage
from schemas.sample import Sample
from schemas.shard import ShardMarker, write_shard
from schemas.storage import Store
from schemas.tables import Reject

# called after each batch with how many of its images were written and how many rejected
Advance = Callable[[int, int], None]


class ShardBuilder:
    """Builds shards one at a time.

    Batches are cut by the plan alone, before anything is rejected from them, so a shard's bytes do
    not depend on where an earlier run was interrupted.

    Args:
        batch_size: images that are decoded and estimated together.
        settings: what the job was asked to do, for the shard's marker.
    """

    def __init__(
        self,
        source: Source,
        estimator: Estimator,
        store: Store,
        batch_size: int,
        settings: dict[str, Any],
    ):
        self.source = source
        self.estimator = estimator
        self.store = store
        self.batch_size = batch_size
        self.settings = settings

    def build(self, shard: int, images: list[SourceImage], advance: Advance) -> ShardMarker:
        """Write one shard. Raises UserError when its folder cannot be written to."""
        samples: list[Sample] = []
        rejects: list[Reject] = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            encoded, bad = self.read(batch)
            if encoded:
                encoded, pixels, undecodable = decode(encoded)
                samples += self.estimate(encoded, pixels)
                bad += undecodable
            rejects += bad
            advance(len(batch) - len(bad), len(bad))
        return write_shard(self.store, shard, samples, rejects, self.settings)

    def read(self, images: list[SourceImage]) -> tuple[list[EncodedImage], list[Reject]]:
        encoded: list[EncodedImage] = []
        rejects: list[Reject] = []
        for image in images:
            try:
                encoded.append(check(image, self.source.read(image)))
            except RejectedError as error:
                rejects.append(error.reject)
            except OSError as error:
                detail = f"{type(error).__name__}: {error}"
                rejects.append(Reject(image.location, "unreadable", detail))
        return encoded, rejects

    def estimate(self, encoded: list[EncodedImage], pixels: Any) -> Iterator[Sample]:
        if not encoded:
            return
        maps = self.estimator(pixels)
        if not np.isfinite(maps).all():
            raise ValueError("the estimator gave values that are not finite")
        for one, image, saliency in zip(encoded, pixels, maps, strict=True):
            height, width, _ = image.shape
            yield Sample(
                key=one.image.key,
                image=one.content,
                extension=one.extension,
                saliency=saliency,
                label=one.image.label,
                height=height,
                width=width,
                source=one.image.location,
                reencoded=one.reencoded,
            )
