"""python -m bench --data URL: rates of the loader and of the estimators on this machine."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.table import machine, measure, show, write
from pipeline import RECIPES, MaskedViews, PlainViews
from precompute.build import ShardBuilder
from precompute.estimators import EstimatorOptions, ScdaOptions, SpectralOptions
from precompute.sources import SourceImage
from schemas import Sample, ShardDataset
from schemas.cli import parse, run
from schemas.storage import Store


@dataclass(frozen=True)
class Options:
    """Measure images/s of every recipe and estimator, in turn in one run, on the same images."""

    data: str = tyro.MISSING
    """A dataset of shards; at least one batch of images."""
    out: Path = Path("out/bench.json")
    """Where the figures are written."""
    batch_size: int = 32
    """Images a batch."""
    batches: int = 8
    """Batches a repeat."""
    repeats: int = 5
    """Repeats, after one that is not counted."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda."""


def loaders(options: Options) -> dict[str, Callable[[], int]]:
    """Each recipe's masked views, and the plain evaluation images as a ceiling."""

    def way(batches: Iterator) -> Callable[[], int]:
        def go() -> int:
            images = 0
            for batch in itertools.islice(batches, options.batches):
                images += len(batch.label)
            if options.device == "cuda":
                torch.cuda.synchronize()
            return images

        return go

    def endless(views: MaskedViews | PlainViews) -> Iterator:
        return itertools.chain.from_iterable(itertools.repeat(views))

    shared: dict[str, Any] = {"batch_size": options.batch_size, "device": options.device}
    ways = {
        f"recipe {name}": way(endless(MaskedViews(options.data, recipe, **shared)))
        for name, recipe in RECIPES.items()
    }
    return ways | {"decode, one centre crop": way(endless(PlainViews(options.data, **shared)))}


class Kept:
    """A source of images that are in memory already."""

    classes = ()

    def __init__(self, samples: list[Sample]):
        self.samples = {sample.key: sample.image for sample in samples}

    def images(self) -> Iterator[SourceImage]:
        return (SourceImage(key, key, -1) for key in self.samples)

    def read(self, image: SourceImage) -> bytes:
        return self.samples[image.key]


def estimators(options: Options, folder: Path) -> dict[str, Callable[[], int]]:
    """Building a shard whole, in one process: decode, estimate, write."""
    samples = list(itertools.islice(ShardDataset.open(options.data), options.batch_size * 2))
    source = Kept(samples)

    def way(estimator: EstimatorOptions) -> Callable[[], int]:
        builder = ShardBuilder(source, estimator.build(), Store(folder), options.batch_size, {})

        def go() -> int:
            marker = builder.build(0, list(source.images()), lambda written, rejected: None)
            return marker.row.samples

        return go

    return {
        "spectral": way(SpectralOptions()),
        "scda mobilenet_v2": way(ScdaOptions("mobilenet_v2", "random")),
        "scda resnet50": way(ScdaOptions("resnet50", "random")),
        "scda resnet50, fp32": way(ScdaOptions("resnet50", "random", precision="fp32")),
    }


def main() -> None:
    options = parse(Options)
    folder = Path(tempfile.mkdtemp())
    try:
        tables = {
            "Loader": measure(loaders(options), options.repeats),
            "Precompute, one process": measure(estimators(options, folder), options.repeats),
        }
    finally:
        shutil.rmtree(folder)
    bases = {"Loader": "recipe none", "Precompute, one process": "scda resnet50"}
    for title, rows in tables.items():
        print(show(title, rows, bases[title]), end="\n\n")
    write(options.out, tables, {**asdict(options), "out": str(options.out)})
    print(f"{machine()['cores']} cores, {machine()['device']}; written to {options.out}")


if __name__ == "__main__":
    run(main)
