"""Seeded global shuffle -> shard plans; the same inputs give the same plan."""

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
        shards: the images of shard 0, 1, 2 ...
        digest: sha256 over all of it.
    """

    shards: list[list[SourceImage]]
    digest: str

    @property
    def images(self) -> int:
        return sum(map(len, self.shards))


def make_plan(
    images: Sequence[SourceImage], *, seed: int, shard_samples: int, limit: int | None = None
) -> Plan:
    """Shuffle all images together and cut them into shards of equal size (to within one).

    Loaders shuffle only within a buffer, so the shuffle that matters is this one. The order is that
    of a hash of seed and key: it depends neither on the order of listing nor on a library's random
    numbers, and stays what it is on any machine.

    Args:
        shard_samples: images a shard, at most.
        limit: keep only so many images of the shuffled order.
    """
    order = sorted(
        images, key=lambda image: hashlib.sha256(f"{seed}:{image.key}".encode()).digest()
    )
    order = order[:limit]
    count = -(-len(order) // shard_samples)
    cuts = [len(order) * shard // count for shard in range(count + 1)] if count else []
    shards = [order[a:b] for a, b in itertools.pairwise(cuts)]
    digest = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
    return Plan(shards, digest)
