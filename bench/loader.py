"""Compare the rate of the loader with the usual ways, on the same images in one run."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from nvidia.dali import fn, pipeline_def

from bench import usual
from bench.table import Way, check_counts, repeat_forever
from pipeline import RECIPES, EvalViews, MaskedViews, devices
from pipeline.graph import IN_FLIGHT, wrap_for_dali
from pipeline.order import SampleOrder
from pipeline.read_ahead import BATCHES_AHEAD, ReadAhead
from pipeline.rng import BatchRng
from pipeline.shards import ShardReader, open_source
from schemas import ShardDataset, UserError
from schemas.sample import IMAGE_EXTENSIONS
from train.config import TrainConfig

Rows = Literal["usual", "tensors", "webdataset", "ours", "ceilings"]
FILLS = ("hp", "blur", "mean")


@dataclass(frozen=True)
class Options:
    """Measure images/s of the loader, of the usual ways and of the ceilings.

    Prints one table, and writes the figures as JSON.
    """

    data: str = tyro.MISSING
    """Local dataset of shards; every row uses its images."""
    out: Path = Path("out/bench-loader.json")
    """JSON file for the figures."""
    rows: tuple[Rows, ...] = ("usual", "tensors", "webdataset", "ours", "ceilings")
    """Rows to measure; `usual` with a saliency forward takes long on a CPU."""
    batch_size: int = 32
    """Images per batch."""
    batches: int = 8
    """Batches per repeat; 1 in rows where a ResNet-50 computes the saliency."""
    repeats: int = 5
    """Number of repeats, after a first one that is not counted."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Number of worker processes of the usual ways."""
    crop_size: int = 224
    """Side of a view in pixels."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the loader: cpu or cuda."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "batches", "repeats", "crop_size")


def make_way(batches: Iterator[Any], use: Callable[[Any], int], count: int, ahead: int) -> Way:
    """Return a way that times `count` batches, after discarding `ahead` prefetched ones."""

    def settle() -> None:
        for batch in itertools.islice(batches, ahead):
            use(batch)
        synchronize()

    def run() -> int:
        images = sum(use(batch) for batch in itertools.islice(batches, count))
        synchronize()
        return images

    return Way(run, settle)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_ways(options: Options, folder: Path) -> dict[str, Way]:
    """Return every row by its name; write the images into `folder` as an image folder."""
    rows: dict[str, Way] = {}
    # Create worker processes first: it is best to fork them before DALI's threads exist.
    if {"usual", "tensors"} & set(options.rows):
        write_folder(options.data, folder)
    if "usual" in options.rows:
        rows |= make_usual_ways(options, folder)
    if "tensors" in options.rows:
        rows |= make_tensor_ways(options, folder)
    if "webdataset" in options.rows:
        rows |= make_webdataset_ways(options)
    if "ours" in options.rows:
        rows |= make_our_ways(options)
    if "ceilings" in options.rows:
        rows |= make_ceilings(options)
    return rows


def write_folder(data: str, folder: Path) -> None:
    """Write the samples' own bytes as an image folder with one class."""
    (folder / "all").mkdir()
    for sample in ShardDataset.open(data):
        (folder / "all" / f"{sample.key}.{sample.extension}").write_bytes(sample.image)


def count_ready(options: Options) -> int:
    """Return how many batches an idle DataLoader has ready: two per worker, and one in hand."""
    return 2 * options.workers + 1


def move_to_device(views: usual.Views, device: str) -> usual.Views:
    return {name: view.to(device, non_blocking=True) for name, view in views.items()}


def make_usual_ways(options: Options, folder: Path) -> dict[str, Way]:
    rows = {}
    localizer = usual.Localizer(options.device, RECIPES["hp"].grid)
    for name in FILLS:
        recipe = replace(RECIPES[name], crop_size=options.crop_size)
        batches = usual.load_folder(folder, recipe, options.batch_size, options.workers, False)
        next(batches)  # forks the workers now
        for title, network, count in (
            (f"usual {name}, no saliency forward", None, options.batches),
            (f"usual {name}, saliency by ResNet-50", localizer, 1),
        ):

            def use(
                views: usual.Views,
                recipe: usual.Recipe = recipe,
                network: usual.Localizer | None = network,
            ) -> int:
                return len(
                    usual.make_views_by_loops(
                        move_to_device(views, options.device), recipe, network
                    )[0]
                )

            # The workers get ahead during a saliency forward, so there is nothing to discard.
            rows[title] = make_way(batches, use, count, 0 if network else count_ready(options))
    return rows


def make_masking_step(options: Options, recipe: usual.Recipe) -> Callable[[usual.Views], int]:
    steps = itertools.count()

    def use(views: usual.Views) -> int:
        samples = np.arange(len(views["query"]))
        rng = BatchRng(0, next(steps), samples, options.device)
        return len(
            usual.make_views_vectorized(move_to_device(views, options.device), recipe, rng)[0]
        )

    return use


def make_tensor_ways(options: Options, folder: Path) -> dict[str, Way]:
    rows = {}
    for name in FILLS:
        recipe = replace(RECIPES[name], crop_size=options.crop_size)
        batches = usual.load_folder(folder, recipe, options.batch_size, options.workers, True)
        next(batches)
        rows[f"torchvision v2 {name}"] = make_way(
            batches, make_masking_step(options, recipe), options.batches, count_ready(options)
        )
    return rows


def make_webdataset_ways(options: Options) -> dict[str, Way]:
    rows = {}
    urls = ShardDataset.open(options.data).shard_urls
    for name in FILLS:
        recipe = replace(RECIPES[name], crop_size=options.crop_size)
        batches = usual.load_webdataset(urls, recipe, options.batch_size, options.workers)
        if next(batches, None) is None:
            raise UserError(
                "webdataset: each worker makes batches of its own shards, and none has "
                f"{options.batch_size} images; give a smaller --batch-size or fewer --workers"
            )
        rows[f"webdataset {name}"] = make_way(
            batches, make_masking_step(options, recipe), options.batches, count_ready(options)
        )
    return rows


def make_our_ways(options: Options) -> dict[str, Way]:
    """Return a row for each recipe, and one for `mean` without hard negatives."""
    own = {name: r for name, r in RECIPES.items() if not name.endswith("-released")}
    recipes = own | {"mean, no hard negative": replace(RECIPES["mean"], hard_negatives=0)}
    return {
        f"ours {name}": make_way(
            repeat_forever(
                MaskedViews(
                    options.data,
                    replace(recipe, crop_size=options.crop_size),
                    options.batch_size,
                    options.device,
                )
            ),
            lambda batch: len(batch.label),
            options.batches,
            3,  # two wait in DALI's queue
        )
        for name, recipe in recipes.items()
    }


def make_ceilings(options: Options) -> dict[str, Way]:
    """Return the rows that no loader of these shards can beat here: reading, decoding, one crop."""
    device = devices.parse_device(options.device)
    plain = EvalViews(options.data, options.batch_size, options.device, crop_size=options.crop_size)
    return {
        **make_reading_ways(options, device),
        "decode only": make_way(
            run_graph(read_by_index(options), device, options, decodes=True),
            len,
            2 * options.batches,
            3,
        ),
        "decode, one center crop": make_way(
            repeat_forever(plain), lambda batch: len(batch.label), options.batches, 3
        ),
    }


def make_reading_ways(options: Options, device: torch.device) -> dict[str, Way]:
    """Return the rows that only read, with the given batch and with the default of `train`.

    The work that Python does once per batch is a large part of so short a time.
    """
    rows = {}
    largest = min(TrainConfig.batch_size, len(ShardDataset.open(options.data)))
    for batch_size in sorted({options.batch_size, largest}):
        sized = replace(options, batch_size=batch_size)
        for name, read in (
            (f"read only, batch {batch_size}", read_by_index(sized)),
            (f"read only, batch {batch_size}, DALI's reader", read_by_dali(sized)),
        ):
            rows[name] = make_way(run_graph(read, device, sized), len, 20 * options.batches, 3)
    return rows


def read_by_index(options: Options) -> Callable[[], Any]:
    """Return a function that adds reading as `MaskedViews` does it to a DALI graph."""
    dataset = ShardDataset.open(options.data)
    sizes = [row.samples for row in dataset.shards]
    order = SampleOrder(sizes, options.batch_size)
    if order.steps == 0:
        raise UserError(
            f"{options.data}: {order.samples} samples do not fill one batch of {order.batch_size}"
        )
    reader = ShardReader(dataset, open_source(dataset, None), order)

    def batches() -> Iterator[Any]:
        for epoch in itertools.count():
            for step in range(order.steps):
                encoded = reader.read(epoch, step)
                yield encoded, wrap_for_dali(encoded.images)

    ahead = ReadAhead(batches(), BATCHES_AHEAD)
    # DALI reads the arrays in place, a few batches later.
    in_flight: deque[Any] = deque(maxlen=2 * IN_FLIGHT)

    def source() -> Any:
        in_flight.append(next(ahead))
        return in_flight[-1][1]

    return lambda: fn.external_source(source=source, batch=True, no_copy=True)


def read_by_dali(options: Options) -> Callable[[], Any]:
    """Return the same with DALI's own WebDataset reader, shuffled in its buffer."""
    dataset = ShardDataset.open(options.data)
    extensions = ";".join(dict.fromkeys(IMAGE_EXTENSIONS.values()))
    return lambda: fn.readers.webdataset(
        paths=dataset.shard_urls,
        index_paths=dataset.index_urls,
        ext=[extensions],
        random_shuffle=True,
        dont_use_mmap=True,
    )


def run_graph(
    read: Callable[[], Any], device: torch.device, options: Options, decodes: bool = False
) -> Iterator[Any]:
    @pipeline_def(
        batch_size=options.batch_size,
        num_threads=devices.count_cpu_threads(),
        device_id=device.index,
    )
    def graph() -> Any:
        encoded = read()
        if not decodes:
            return encoded.shape()  # outputting the bytes would copy them once more
        return fn.decoders.image(encoded, device="mixed" if device.type == "cuda" else "cpu")

    pipeline = graph()
    while True:
        yield pipeline.run()[0]


def choose_baselines(names: Sequence[str]) -> dict[str, str]:
    """Return the row to compare each row with.

    It is the usual way with the same fill and no saliency forward, or DALI's reader with the same
    batch.
    """
    readers = {name: f"{name}, DALI's reader" for name in names}
    return {name: reader for name, reader in readers.items() if reader in names} | {
        name: f"usual {fill}, no saliency forward"
        for name in names
        for fill in FILLS
        if fill in name.replace(",", "").split() and f"usual {fill}, no saliency forward" in names
    }
