"""MaskedViews: the DALI graph and the masks as one iterable of batches, with exact state.

The graph (read, decode, one window for image and saliency) runs on the device ahead of the trainer;
jitter, filters, masks and fills are tensor operations on its output.

**Order.** The samples were shuffled when they were written. Here the shards change places each
epoch and a buffer of 1024 samples mixes further. Ranks share an epoch's samples evenly and
disjointly. Each rank takes `floor(floor(samples / world_size) / batch_size)` steps; what is left
over at an epoch's end (other samples in each epoch) is read and thrown away, so ranks never drift
apart; `dropped` counts it.

**Draws.** The windows are keyed by (seed, world size, global rank), everything else also by epoch
and step. Same settings, same batches, bit for bit.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvidia import dali
from nvidia.dali import Pipeline

from pipeline import devices, failures, reader
from pipeline.assemble import View, assemble, cut_all
from pipeline.batch import EXTRAS, Batch, Extra
from pipeline.cache import Cache
from pipeline.draws import Draws
from pipeline.fills import FILLS
from pipeline.graph import SHUFFLE_BUFFER, graph, in_drawn_order
from pipeline.masks import MASKS
from pipeline.memory import Buffers, keep_freed_memory
from pipeline.recipes import Recipe, get_recipe
from pipeline.registry import find
from schemas import UserError

log = logging.getLogger(__name__)

STATE_VERSION = 1

MAY_CHANGE_BETWEEN_EPOCHS = ("world_size", "rank", "batch_size")


class MaskedViews:
    """Masked query, key and hard-negative views of a dataset; iterating yields a `Batch` a step.

    An iteration ends with the epoch; iterating again is the next one. After an iteration that was
    left early, or a state that was loaded, the rest of that epoch comes first.

    Args:
        url: the dataset's folder: a plain path, s3:// or gs://; with a cache any fsspec URL.
        recipe: a name of `RECIPES` or a recipe.
        batch_size: samples a step on this rank.
        device: `cuda` or `cpu`, where the graph runs and the batches are.
        rank, world_size: this process among all (the global rank).
        seed: of everything drawn.
        report: extras to put into each batch, any of "masks", "saliency", "windows",
            "crops", "photometric", "keys".
        cache: where a remote dataset is copied to first.

    Attributes:
        epoch, step: of the batch that comes next, from 0.
        samples: in the dataset. dropped: how many of them an epoch leaves out, over all ranks.

    Raises:
        UserError: the dataset, its size, the recipe or the device does not allow it.
    """

    def __init__(
        self,
        url: str | Path,
        recipe: str | Recipe = "hp",
        batch_size: int = 256,
        device: str = "cuda",
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        report: Sequence[Extra] = (),
        cache: Cache | None = None,
    ):
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        self.device = devices.device_of(device)
        self._cuts = self.device.type == "cuda"  # where the views are cut: see `pipeline.views`
        if self.recipe.fill != "none":
            find("fill", self.recipe.fill, FILLS)
            for name in (self.recipe.query_mask, self.recipe.hard_negative_mask):
                if name != "regions":  # drawn from both windows: see `pipeline.regions`
                    find("mask", name, MASKS)
        for extra in report:
            if extra not in EXTRAS:
                raise UserError(f"unknown extra {extra!r} in report: there are {', '.join(EXTRAS)}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"batch size {batch_size}, rank {rank}, world size {world_size}: a batch has at "
                "least 1 sample, and ranks are 0 .. world size - 1"
            )
        self.report = frozenset(report)
        self._guided = self.recipe.fill != "none" or "saliency" in self.report
        self.shards = reader.open_shards(url, cache)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed

        self.samples = self.shards.samples
        self._steps = self.samples // world_size // batch_size
        self.dropped = self.samples - self._steps * batch_size * world_size
        if self._steps == 0:
            raise UserError(
                f"{url}: {self.samples} samples are too few for {world_size} ranks x batch "
                f"{batch_size} = {world_size * batch_size}; choose a smaller batch"
            )
        if rank == 0:
            log.info(
                f"{url}: {self.samples} samples, {self._steps} steps an epoch of {world_size} x "
                f"{batch_size}; {self.dropped} samples, other ones each epoch, are left out"
            )
        self.epoch = self.step = 0
        self._begun = 0  # the epoch in which this order and these draws began
        self._checkpoint: bytes | None = None
        self._pipeline: Pipeline | None = None
        self._buffers = Buffers()
        if self.device.type == "cpu":
            keep_freed_memory()

    def __len__(self) -> int:
        """Steps an epoch, the same on every rank."""
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._next()
            yield batch
            if self.step == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, on this rank.

        Returns:
            version (int), fingerprint (dict), epoch, step (int, of the next batch), begun (int, the
            epoch in which this order began) and pipeline (DALI's checkpoint, bytes; None before the
            first batch).
        """
        if self._pipeline is not None:
            self._checkpoint = self._pipeline.checkpoint()
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint(),
            "epoch": self.epoch,
            "step": self.step,
            "begun": self._begun,
            "pipeline": self._checkpoint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`: the batches that follow are those that would have followed.

        Between epochs a state may come from another world size (and then any rank and batch size):
        the epoch counts on, the order and the draws start afresh, keyed by it.

        Raises:
            UserError: the state is of another version, or of other settings; it names which differ.
        """
        if state["version"] != STATE_VERSION:
            raise UserError(
                f"loader state of version {state['version']}, this is version {STATE_VERSION}"
            )
        mine, theirs = self._fingerprint(), state["fingerprint"]
        differ = [name for name in mine if mine[name] != theirs.get(name)]
        resized = "world_size" in differ and set(differ) <= set(MAY_CHANGE_BETWEEN_EPOCHS)
        if differ and not (resized and state["step"] == 0):
            changes = ", ".join(f"{name} {theirs.get(name)} -> {mine[name]}" for name in differ)
            inside = f" inside epoch {state['epoch']}; between epochs it may" if resized else ""
            raise UserError(
                f"the loader's state cannot go on under other settings{inside}: {changes}"
            )
        self.epoch, self.step = state["epoch"], state["step"]
        self._begun = self.epoch if resized else state["begun"]
        self._checkpoint = None if resized else state["pipeline"]
        self._pipeline = None

    def _fingerprint(self) -> dict[str, Any]:
        """What the order and the draws depend on."""
        return {
            "dataset": self.shards.digest,
            **{f"recipe.{k}": str(v) for k, v in dataclasses.asdict(self.recipe).items()},
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "rank": self.rank,
            "seed": self.seed,
            "device": self.device.type,
            "shuffle_buffer": SHUFFLE_BUFFER,
            "dali": dali.__version__,
        }

    def _build(self) -> Pipeline:
        shared = (self.seed, self.world_size, self._begun)
        pipeline = graph(
            in_drawn_order(self.shards, *shared),
            self.recipe,
            self.device,
            self.rank,
            self.world_size,
            cuts=self._cuts,
            guided=self._guided,
            shuffle_seed=reader.derived_seed("reader", *shared),
            batch_size=self.batch_size,
            num_threads=reader.threads(),
            device_id=self.device.index,
            seed=reader.derived_seed("graph", *shared, self.rank),
            enable_checkpointing=True,
            checkpoint=self._checkpoint,
        )
        with failures.explained(self.shards.url, self.shards.tars):
            pipeline.build()
        return pipeline

    def _run(self) -> list[Any]:
        if self._pipeline is None:
            self._pipeline = self._build()
        return reader.run(self._pipeline, self.device, self.shards)

    def _next(self) -> Batch:
        batch = self._batch(self._run())
        self.step += 1
        if self.step == self._steps:
            # every rank reads the same number of batches, the last one padded: see `graph`
            longest_share = -(-self.samples // self.world_size)
            for _ in range(-(-longest_share // self.batch_size) - self._steps):
                self._run()
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def _batch(self, outputs: list[Any]) -> Batch:
        label, source, *rest = outputs
        images = None if self._cuts else rest.pop(0)
        each = len(rest) // (1 + self.recipe.pair)  # outputs a view
        query = self._view(images, rest[:each])
        key = self._view(images, rest[each:]) if self.recipe.pair else None
        seed = reader.derived_seed(
            "views", self.seed, self.world_size, self.rank, self._begun, self.epoch, self.step
        )
        draws = Draws(seed, self.device)
        fields = assemble(query, key, self.recipe, draws, self.report, self._buffers)
        if "keys" in self.report:
            fields["sample_keys"] = reader.parse_keys(reader.tensor(source))
        labels = reader.parse_labels(reader.tensor(label)).to(self.device, non_blocking=True)
        return Batch(label=labels, **{"key": None, "hard_negative": None, **fields})

    def _view(self, images: Any, outputs: list[Any]) -> View:
        window, *rest = map(reader.tensor, outputs)
        saliency = rest.pop(0).squeeze(-1) if self._guided else None
        image = rest[0] if rest else cut_all(reader.tensors(images), window, self.recipe.crop_size)
        return View(image, saliency, window)
