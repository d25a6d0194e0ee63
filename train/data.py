"""Batches for the trainer: from shards, or synthetic to time the step alone."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, Protocol

import torch

from pipeline import Batch, Recipe


class Views(Protocol):
    """The interface of a loader for the trainer; `pipeline.MaskedViews` implements it."""

    samples: int
    dropped: int
    cache_description: str

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BatchStream:
    """An endless stream of batches that measures how long each step waited for its data.

    Attributes:
        waited: seconds that the last step waited.
        last: the batch of the last step.
        keys: the keys of this rank's samples, one list for each of the last `memory` steps.
    """

    def __init__(self, views: Views, memory: int) -> None:
        self.batches = chain.from_iterable(repeat(views))
        self.waited = 0.0
        self.last: Batch | None = None
        self.keys: deque[list[str]] = deque(maxlen=memory)

    def next_micro_batches(self, count: int) -> Iterator[Batch]:
        """Yield the next batch, split into `count` micro-batches of equal size."""
        start = time.perf_counter()
        self.last = next(self.batches)
        self.waited = time.perf_counter() - start
        self.keys.append(self.last.sample_keys or [])
        return split_batch(self.last, count)


def split_batch(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield `count` micro-batches of equal size, each with the hard negatives of its own keys.

    The extras of the batch are not split: each micro-batch keeps all of them.
    """
    if count == 1:
        yield batch
        return
    size = len(batch.query) // count
    for first in range(0, len(batch.query), size):
        rows = slice(first, first + size)
        fields = {
            name: getattr(batch, name)[rows]
            for name in ("query", "key", "label", "query_regions", "key_regions", "region_valid")
            if getattr(batch, name) is not None
        }
        hard = batch.hard_negative
        if hard is not None:
            hard = torch.cat([view[rows] for view in hard.split(len(batch.query))])
        yield replace(batch, **fields, hard_negative=hard)


class SyntheticViews:
    """One random batch, repeated, to measure a step without the cost of data.

    Args:
        samples: pretended number of images per epoch, over all ranks.
        batch_size: images per step on this rank.
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

        def draw_images(count: int) -> torch.Tensor:
            side = recipe.crop_size
            shape = (count, side, side, 3)
            return torch.randn(shape, generator=generator, device=device).permute(0, 3, 1, 2)

        hard_count = recipe.hard_negatives * batch_size
        self.batch = Batch(
            query=draw_images(batch_size),
            key=draw_images(batch_size) if recipe.pair else None,
            hard_negative=draw_images(hard_count) if hard_count else None,
            label=torch.randint(
                SYNTHETIC_CLASSES, (batch_size,), generator=generator, device=device
            ),
            **draw_regions(recipe, batch_size, generator),
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


def draw_regions(recipe: Recipe, size: int, generator: torch.Generator) -> dict[str, Any]:
    """Draw the region fields of a batch: boxes of half a view's side, all valid."""
    if not recipe.regions:
        return {}
    half = recipe.crop_size / 2
    shape, device = (2, size, recipe.regions, 2), generator.device
    start = half * torch.rand(shape, generator=generator, device=device)
    query, key = torch.cat([start, start + half], dim=-1)
    valid = torch.ones(query.shape[:2], dtype=torch.bool, device=device)
    return {"query_regions": query, "key_regions": key, "region_valid": valid}
