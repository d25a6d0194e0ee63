"""Rates of the estimators: building a shard whole, in one process."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from bench.table import Way
from precompute.build import ShardBuilder
from precompute.encode import Resize
from precompute.estimators import EstimatorOptions, ScdaOptions, SpectralOptions
from precompute.sources import Source, SourceImage
from schemas import Sample, ShardDataset
from schemas.storage import Store


@dataclass(frozen=True)
class Options:
    """Images/s of every estimator: decode, estimate and write a shard, in one process."""

    data: str = tyro.MISSING
    """A dataset of shards; at least one batch of images."""
    out: Path = Path("out/bench-estimators.json")
    """Where the figures are written."""
    batch_size: int = 32
    """Images a batch; a repeat is two of them."""
    repeats: int = 5
    """Repeats, after one that is not counted."""


class Kept(Source):
    """A source of images that are in memory already."""

    def __init__(self, samples: list[Sample]):
        self.samples = {sample.key: sample.image for sample in samples}

    def images(self) -> Iterator[SourceImage]:
        return (SourceImage(key, key, -1) for key in self.samples)

    def read(self, image: SourceImage) -> bytes:
        return self.samples[image.key]


def ways(options: Options, folder: Path) -> dict[str, Way]:
    """Every row by its name; shards are written to `folder`."""
    samples = list(itertools.islice(ShardDataset.open(options.data), options.batch_size * 2))
    source = Kept(samples)

    def way(estimator: EstimatorOptions) -> Way:
        builder = ShardBuilder(
            source, estimator.build(), Store(folder), options.batch_size, Resize(), {}
        )

        def go() -> int:
            marker = builder.build(0, list(source.images()), lambda written, rejected: None)
            return marker.row.samples

        return Way(go)

    return {
        "spectral": way(SpectralOptions()),
        "scda mobilenet_v2": way(ScdaOptions("mobilenet_v2", "random")),
        "scda resnet50": way(ScdaOptions("resnet50", "random")),
        "scda resnet50, fp32": way(ScdaOptions("resnet50", "random", precision="fp32")),
    }
