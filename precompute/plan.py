"""Shuffle all images with a seed and cut them into shards; the same inputs give the same plan.

This file plans in memory, with about 540 bytes per image; `plan_job.py` plans on a cluster.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from precompute.sources import SourceImage
from schemas.counts import format_count


@dataclass(frozen=True)
class Plan:
    """The assignment of images to shards, in order.

    Attributes:
        shards: the images of each shard.
        digest: sha256 over all images, their order and their shards.
    """

    shards: Sequence[Sequence[SourceImage]]
    digest: str

    @property
    def images(self) -> int:
        """Number of images in all shards."""
        return sum(map(len, self.shards))

    def size(self, shard: int) -> int:
        """Return the number of images in a shard."""
        return len(self.shards[shard])

    def describe(self) -> str:
        """Return the numbers of images and shards as text."""
        images = format_count(self.images, "image")
        return f"{images} -> {format_count(len(self.shards), 'shard')}"

    def message(self, shard: int) -> str:
        """Return a shard's images as text for a worker; "" if workers read the plan themselves."""
        return json.dumps(self.shards[shard])

    def images_of(self, shard: int, message: str) -> list[SourceImage]:
        """Return a shard's images from `message`; runs in a worker."""
        return [SourceImage(*image) for image in json.loads(message)]

    def for_workers(self) -> "Plan":
        """Return a copy without the images, enough for a worker to call `images_of`."""
        return Plan([], self.digest)


def compute_sort_key(seed: int, key: str) -> bytes:
    """Return the sort key of an image: 32 bytes, a hash of the seed and the image's key."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def cut_shards(images: int, shard_samples: int) -> list[int]:
    """Return the bounds of shards of equal size (to within one) in the sorted images.

    Returns:
        ascending indices, one more than there are shards; empty without images.
    """
    count = -(-images // shard_samples)
    return [images * shard // count for shard in range(count + 1)] if count else []


def make_plan(
    images: Sequence[SourceImage], *, seed: int, shard_samples: int, limit: int | None = None
) -> Plan:
    """Shuffle all images together and cut them into shards of equal size (to within one).

    Loaders shuffle only within a buffer, so this global shuffle is what matters. Images are
    sorted by a hash of seed and key, so the order depends neither on the order of listing nor on a
    library's random numbers, and is the same on any machine.

    Args:
        shard_samples: maximum number of images per shard.
        limit: maximum number of images; the first ones of the shuffled order are kept.
    """
    order = sorted(images, key=lambda image: compute_sort_key(seed, image.key))[:limit]
    cuts = cut_shards(len(order), shard_samples)
    shards = [order[a:b] for a, b in itertools.pairwise(cuts)]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return Plan(shards, digest)
