"""Batches for the loop: from shards, or made up to time the step alone."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Protocol

import torch

from pipeline import Batch, Recipe


class Views(Protocol):
    """What the loop asks of a loader; `pipeline.MaskedViews` is one."""

    samples: int
    dropped: int
    cache_description: str

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Feed:
    """An endless stream of batches that notes how long each step waited, and its keys.

    Attributes:
        waited: seconds that the last step waited for its data.
        last: its batch.
        keys: for each of the last `memory` steps, the keys of its samples on this rank.
    """

    def __init__(self, views: Views, memory: int) -> None:
        self.stream = chain.from_iterable(repeat(views))
        self.waited = 0.0
        self.last: Batch | None = None
        self.keys: deque[list[str]] = deque(maxlen=memory)

    def parts(self, count: int) -> Iterator[Batch]:
        """The next batch in `count` equal parts."""
        start = time.perf_counter()
        self.last = next(self.stream)
        self.waited = time.perf_counter() - start
        self.keys.append(self.last.sample_keys or [])
        return split(self.last, count)


def split(batch: Batch, count: int) -> Iterator[Batch]:
    """Images, labels and windows in `count` parts, each with the hard negatives of its own keys."""
    if count == 1:
        yield batch
        return
    size = len(batch.query) // count
    for first in range(0, len(batch.query), size):
        rows = slice(first, first + size)
        parts = {
            name: getattr(batch, name)[rows]
            for name in ("query", "key", "label", "query_regions", "key_regions", "region_valid")
            if getattr(batch, name) is not None
        }
        hard = batch.hard_negative
        if hard is not None:
            hard = torch.cat([view[rows] for view in hard.split(len(batch.query))])
        yield replace(batch, **parts, hard_negative=hard)


class SyntheticViews:
    """One made-up batch, over and over: what a step costs when data costs nothing.

    Args:
        samples: images that an epoch is said to have, over all ranks.
        batch_size: of this rank.
    """

    cache_description = ""

    def __init__(
        self,
        samples: int,
        recipe: Recipe,
        batch_size: int,
        device: torch.device,
        world_size: int,
        seed: int,
    ) -> None:
        self.samples = samples
        self.steps = max(1, samples // (batch_size * world_size))
        self.dropped = max(0, samples - self.steps * batch_size * world_size)
        self.step = 0
        generator = torch.Generator(device).manual_seed(seed)

        def images(count: int) -> torch.Tensor:
            side = recipe.crop_size
            shape = (count, side, side, 3)
            return torch.randn(shape, generator=generator, device=device).permute(0, 3, 1, 2)

        many = recipe.hard_negatives
        self.batch = Batch(
            query=images(batch_size),
            key=images(batch_size) if recipe.pair else None,
            hard_negative=images(many * batch_size) if many else None,
            label=torch.randint(
                SYNTHETIC_CLASSES, (batch_size,), generator=generator, device=device
            ),
            **made_up_regions(recipe, batch_size, generator),
        )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.step = (self.step + 1) % self.steps
            yield self.batch
            if self.step == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


SYNTHETIC_CLASSES = 1000


def made_up_regions(recipe: Recipe, size: int, generator: torch.Generator) -> dict[str, Any]:
    """The fields of a batch that tell its regions: boxes of half a view's side, all valid."""
    if not recipe.regions:
        return {}
    half = recipe.crop_size / 2
    shape, device = (2, size, recipe.regions, 2), generator.device
    start = half * torch.rand(shape, generator=generator, device=device)
    query, key = torch.cat([start, start + half], dim=-1)
    valid = torch.ones(query.shape[:2], dtype=torch.bool, device=device)
    return {"query_regions": query, "key_regions": key, "region_valid": valid}
