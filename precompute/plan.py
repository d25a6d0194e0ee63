"""Seeded global shuffle -> shard plans; the same inputs give the same plan.

This file plans in memory, with about 540 bytes per image; `plan_job.py` plans on a cluster.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from precompute.sources import SourceImage


@dataclass(frozen=True)
class Plan:
    """Which images go into which shard, in which order.

    Attributes:
        shards: the images of each shard.
        digest: sha256 over all of it.
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

    def message(self, shard: int) -> str:
        """Return a shard's images as text for a worker; "" where the worker reads the plan."""
        return json.dumps(self.shards[shard])

    def images_of(self, shard: int, message: str) -> list[SourceImage]:
        """Return a shard's images from `message`; runs in a worker."""
        return [SourceImage(*image) for image in json.loads(message)]

    def for_workers(self) -> "Plan":
        """Return what a worker needs to call `images_of`: not the images themselves."""
        return Plan([], self.digest)


def plan_order(seed: int, key: str) -> bytes:
    """Return what images are sorted by: 32 bytes, a hash of seed and key."""
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def cut_shards(images: int, shard_samples: int) -> list[int]:
    """Return where shards begin and end in the sorted images; they are of equal size (within one).

    Returns:
        ascending places, one more than there are shards; empty without images.
    """
    count = -(-images // shard_samples)
    return [images * shard // count for shard in range(count + 1)] if count else []


def make_plan(
    images: Sequence[SourceImage], *, seed: int, shard_samples: int, limit: int | None = None
) -> Plan:
    """Shuffle all images together and cut them into shards of equal size (to within one).

    Loaders shuffle only within a buffer, so the shuffle that matters is this one. The order is that
    of a hash of seed and key: it depends neither on the order of listing nor on a library's random
    numbers, and stays what it is on any machine.

    Args:
        shard_samples: maximum number of images per shard.
        limit: keep only so many images of the shuffled order.
    """
    order = sorted(images, key=lambda image: plan_order(seed, image.key))[:limit]
    cuts = cut_shards(len(order), shard_samples)
    shards = [order[a:b] for a, b in itertools.pairwise(cuts)]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return Plan(shards, digest)
