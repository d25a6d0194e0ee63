"""MaskedViews: an iterable of batches of masked views from shards, with exact resume.

    order       selects the samples of a batch from (seed, epoch, step)     }
    shards      reads their encoded bytes                                   } in a thread, ahead
    crop        draws a crop window and a flip for each view                }
    rng         draws random numbers for the rest                           }
    graph       decodes and crops                                           } ahead
    assemble    applies color jitter, filters, masks and fills

All random numbers come from `rng`, so in one epoch the crops, colors, masks and noise of a sample
depend neither on its batch and rank nor on the world size and the device (pixels of two devices
agree up to rounding). The loader's state is therefore two integers, epoch and step, and the number
of ranks may change between any two steps if the global batch stays the same.
"""

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pipeline import devices
from pipeline.assemble import View, assemble, count_words, draw_parameters
from pipeline.batch import EXTRAS, Batch, Extra
from pipeline.cache import Cache
from pipeline.crop import draw_windows
from pipeline.fills import FILLS
from pipeline.graph import DecodedBatch, Decoder, PreparedBatch, ViewSpec
from pipeline.masks import MASKS
from pipeline.order import SHUFFLE_SHARDS, SampleOrder
from pipeline.recipes import Recipe, get_recipe
from pipeline.registry import find
from pipeline.rng import BatchRng
from pipeline.shards import ShardReader, open_source
from schemas import ShardDataset, UserError
from schemas.cli import digest_source
from schemas.counts import format_count
from schemas.settings import fields_of, find_differences, format_differences, to_plain

log = logging.getLogger(__name__)

STATE_VERSION = 2
STATE_KEYS = {"version", "fingerprint", "epoch", "step"}

DecodeOn = Literal["gpu", "cpu"]


class MaskedViews:
    """Masked query, key and hard-negative views of a dataset; each step yields a `Batch`.

    An iteration ends with the epoch, and iterating again starts the next one. After an iteration
    that was left early, or after `load_state_dict`, iterating first completes that epoch.

    Args:
        url: dataset folder: a local path or any fsspec URL.
        recipe: a name in `RECIPES` or a recipe.
        batch_size: samples per step on this rank; the global batch is batch_size * world_size.
        device: `cuda` or `cpu`; the batches are there.
        rank, world_size: global rank of this process and the number of processes.
        seed: random seed for sample order, crops and masks, 0 or more.
        report: extras to add to each batch: any of "masks", "saliency", "windows", "crops",
            "photometric" and "keys".
        cache: folder and maximum size of the cache for the shards of a remote dataset.
        shuffle_shards: number of shards whose samples are shuffled together (`order.SampleOrder`).
        streams: number of sequences that the shards are dealt to; with as many as there are nodes,
            each node reads only its own shards.
        decode_on: where images are decoded and cropped if the device is a GPU: there, or on the
            CPU, which leaves the GPU to the training and needs several cores.

    Attributes:
        epoch, step: position of the next batch, both from 0.
        samples: number of samples in the dataset.
        dropped: number of samples that an epoch leaves out, over all ranks.
        cache_description: one line about where shards are kept; empty for a local dataset.

    Raises:
        UserError: the dataset, its size, the recipe or the device is unsuitable; while iterating,
            a shard or a sample does not match the tables. The message names it.
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
        shuffle_shards: int = SHUFFLE_SHARDS,
        streams: int = 1,
        decode_on: DecodeOn = "gpu",
    ):
        self.recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
        self.device = devices.parse_device(device)
        check_masks_and_fills(self.recipe)
        self._code = digest_custom_functions(self.recipe)  # now: the file may change while it runs
        if decode_on not in get_args(DecodeOn):
            raise UserError(f"decode_on {decode_on!r}: choose gpu or cpu")
        for extra in report:
            if extra not in EXTRAS:
                raise UserError(f"unknown extra {extra!r} in report: there are {', '.join(EXTRAS)}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(
                f"batch size {batch_size}, rank {rank}, world size {world_size}: a batch has at "
                "least 1 sample, and ranks are 0 .. world size - 1"
            )
        self.report = frozenset(report)
        self.batch_size, self.rank, self.world_size, self.seed = batch_size, rank, world_size, seed
        needs_saliency = self.recipe.uses_saliency or "saliency" in self.report
        self._spec = ViewSpec(
            self.recipe.crop_size,
            views=1 + self.recipe.pair,
            grid=self.recipe.grid if needs_saliency else None,
            interpolation=self.recipe.interpolation,
            on_device=self.device.type == "cuda" and decode_on == "gpu",
        )
        self._decode_on = self.device if self._spec.on_device else torch.device("cpu")
        self.dataset = ShardDataset.open(url)
        self.order = SampleOrder(
            [row.samples for row in self.dataset.shards],
            batch_size * world_size,
            seed,
            shuffle_shards,
            streams,
        )
        self.order.find_slice(rank, world_size)
        self.samples, self.dropped = self.order.samples, self.order.dropped
        self._refuse_small_dataset()
        streams_per_rank = max(1, streams // world_size)
        self._source = open_source(self.dataset, cache, streams_per_rank * shuffle_shards)
        self.cache_description = self._source.description
        if rank == 0:
            log.info(
                f"{self.dataset.url}: {format_count(self.samples, 'sample')}, "
                f"{format_count(len(self), 'step')} per epoch of {world_size} x {batch_size}; "
                "dropped per epoch (different ones each epoch): "
                f"{format_count(self.dropped, 'sample')}"
            )
        self.epoch = self.step = 0
        self._batches: Decoder | None = None

    def _refuse_small_dataset(self) -> None:
        """Raise UserError if an epoch has no step, or a stream no shard."""
        url, streams = self.dataset.url, self.order.streams
        if streams > len(self.dataset.shards):
            raise UserError(
                f"{url}: {len(self.dataset.shards)} shards are too few for {streams} streams; "
                "choose fewer streams"
            )
        if self.order.steps == 0:
            ranks = f"{self.world_size} ranks x " if self.world_size > 1 else ""
            source = f" from {streams} streams" if streams > 1 else ""
            raise UserError(
                f"{url}: {self.samples} samples are too few for {ranks}batch {self.batch_size}"
                f"{source}; choose a smaller batch size"
            )

    def __len__(self) -> int:
        """Return the number of steps per epoch, the same on every rank and in every epoch."""
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._next()
            yield batch
            if self.step == 0:
                return

    def close(self) -> None:
        """End the threads and close the shards; iterating again reopens them."""
        if self._batches is not None:
            self._batches.close()
            self._source.prefetch(())
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, which is the same on every rank.

        Returns:
            version (int), fingerprint (dict of plain values), and epoch and step (int) of the next
            batch.
        """
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict()`: the next batches are those that would have followed.

        Rank, world size and device may differ from those of the saved state. The global batch may
        differ only if the state is at the end of an epoch.

        Raises:
            UserError: it is not a state of a loader, or has a later version or other settings; the
                message names those that differ.
        """
        if missing := STATE_KEYS - state.keys():
            raise UserError(f"not a state of a loader: it has no {', '.join(sorted(missing))}")
        if state["version"] > STATE_VERSION:
            raise UserError(
                f"loader state of version {state['version']}, this code reads up to {STATE_VERSION}"
            )
        saved = convert_fingerprint(state)
        # an older state does not have the digests of custom functions
        defaults = build_default_fingerprint() | self._code
        changes = find_differences(saved, self._fingerprint(), defaults)
        is_batch_size_only = [change.name for change in changes] == ["batch_size"]
        if changes and not (is_batch_size_only and state["step"] == 0):
            where = " inside an epoch" if is_batch_size_only else ""
            found = format_differences(changes)
            raise UserError(f"the loader cannot resume{where} under other settings: {found}")
        if state["epoch"] < 0 or not 0 <= state["step"] < len(self):
            raise UserError(
                f"loader state of epoch {state['epoch']}, step {state['step']}: an epoch has steps "
                f"0 to {len(self) - 1}"
            )
        self.close()
        self.epoch, self.step = state["epoch"], state["step"]
        if state["version"] == 1 and self.step and self.rank == 0:
            log.warning(
                f"the state of an earlier version is inside epoch {self.epoch}, whose order of "
                f"samples no longer exists: its last {len(self) - self.step} steps follow the new "
                f"order, so up to {min(self.step, len(self) - self.step)} batches of samples "
                "repeat in this epoch and as many are missing; later epochs are complete"
            )

    def _fingerprint(self) -> dict[str, Any]:
        """Return the settings that sample order and random numbers depend on."""
        return {
            "dataset": self.dataset.digest,
            "recipe": to_plain(fields_of(self.recipe)),
            "batch_size": self.batch_size * self.world_size,
            "seed": self.seed,
            "shuffle_shards": self.order.shuffle_shards,
            "streams": self.order.streams,
            **self._code,
        }

    def _next(self) -> Batch:
        if self._batches is None:
            reader = ShardReader(self.dataset, self._source, self.order, self.rank, self.world_size)
            batches = prepare_batches(
                reader, self.order, self.recipe, self.device, self.epoch, self.step
            )
            self._batches = Decoder(
                batches,
                self._spec,
                self._decode_on,
                self.batch_size,
                self.dataset.url,
                stage_for_gpu=self.device.type == "cuda",
            )
        try:
            batch = self._assemble(next(self._batches))
        except BaseException:  # including KeyboardInterrupt, after which a notebook may go on
            # so that a later call tries again; not `close`, which waits for a read that goes on
            self._batches = None
            raise
        self.step += 1
        if self.step == self.order.steps:
            self.epoch, self.step = self.epoch + 1, 0
        return batch

    def _assemble(self, decoded: DecodedBatch) -> Batch:
        encoded, rng = decoded.prepared.encoded, decoded.prepared.rng
        assert rng is not None, "`prepare_batches` makes it"
        query, *key_views = (
            self._view(decoded, number) for number in range(len(decoded.prepared.windows))
        )
        key = key_views[0] if key_views else None
        parameters = decoded.prepared.parameters
        fields = assemble(query, key, self.recipe, rng, self.report, parameters)
        if "keys" in self.report:
            fields["sample_keys"] = encoded.keys
        labels = devices.to_device(torch.from_numpy(encoded.labels), self.device)
        return Batch(label=labels, **{"key": None, "hard_negative": None, **fields})

    def _view(self, decoded: DecodedBatch, number: int) -> View:
        window = torch.from_numpy(decoded.prepared.windows[number])
        image = devices.to_device(decoded.views[number], self.device)
        if not decoded.saliency:
            return View(image, None, window)
        return View(image, devices.to_device(decoded.saliency[number], self.device), window)


def build_default_fingerprint() -> dict[str, Any]:
    """Return the values of settings that an older state does not contain."""
    return {"recipe": fields_of(Recipe()), "shuffle_shards": SHUFFLE_SHARDS, "streams": 1}


def digest_custom_functions(recipe: Recipe) -> dict[str, str]:
    """Return the sha256 of the files of the recipe's custom masks and fill, by `code.FIELD`."""
    paths = {name: getattr(recipe, name) for name in ("query_mask", "hard_negative_mask", "fill")}
    return {
        f"code.{name}": digest_source(name, path) for name, path in paths.items() if ":" in path
    }


def convert_fingerprint(state: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a state in the current format.

    In version 1, the order of samples was another one, which depended on the world size, and recipe
    values were strings.
    """
    saved = state["fingerprint"]
    if state["version"] > 1:
        return saved
    current_fields = fields_of(Recipe())
    recipe = {
        name: value if isinstance(current_fields.get(name), str) else ast.literal_eval(value)
        for name, value in (
            (key.removeprefix("recipe."), value)
            for key, value in saved.items()
            if key.startswith("recipe.")
        )
    }
    batch_size = saved["batch_size"] * saved["world_size"]
    unchanged = {name: saved[name] for name in ("dataset", "seed")}
    return {**unchanged, "recipe": recipe, "batch_size": batch_size}


def prepare_batches(
    reader: ShardReader,
    order: SampleOrder,
    recipe: Recipe,
    device: torch.device,
    epoch: int,
    step: int,
) -> Iterator[PreparedBatch]:
    """Read a rank's batches from a step on, without end, and draw their random numbers.

    The recipes need no others; custom masks and fills may draw more later.
    """
    words = count_words(recipe)
    with closing(reader):
        while True:
            encoded = reader.read(epoch, step)
            rng = BatchRng(order.seed, epoch, encoded.samples, device, words)
            crop_rng = rng.stream("crop")
            windows = [
                draw_windows(encoded.height, encoded.width, recipe, crop_rng)
                for _ in range(1 + recipe.pair)
            ]
            yield PreparedBatch(encoded, windows, rng, draw_parameters(recipe, rng))
            step += 1
            if step == order.steps:
                epoch, step = epoch + 1, 0


def check_masks_and_fills(recipe: Recipe) -> None:
    """Raise UserError if the recipe names a mask or a fill that does not exist."""
    if recipe.fill == "none":
        return
    find("fill", recipe.fill, FILLS)
    if recipe.query_mask != "regions":  # it is not in the registry, because it needs both windows
        find("mask", recipe.query_mask, MASKS)
    find("mask", recipe.hard_negative_mask, MASKS)
