"""Inspect the views and the order of samples that a training run gets.

    saliency-pipeline preview --data URL --recipe hp --out preview.png
    saliency-pipeline order   --data URL --batch-size 256

`--help` after a command lists its options. In a checkout `python -m pipeline` is the same.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pipeline.preview import write_preview
from pipeline.recipes import RECIPES, Recipe
from pipeline.shuffle_quality import describe_shuffle
from schemas import ShardDataset
from schemas.cli import parse, run, run_subcommand
from schemas.counts import format_count


@dataclass(frozen=True)
class Preview:
    """Write a contact sheet: one row per sample with its image, saliency and augmented views."""

    data: str = tyro.MISSING
    """Dataset folder: a local path or an s3:// URL."""
    recipe: Recipe = field(default_factory=lambda: RECIPES["hp"])
    """Recipe by name; single fields can be overridden."""
    out: Path = Path("preview.png")
    """PNG file to write; an HTML page of the same name is written beside it."""
    samples: int = 12
    """Number of samples to show, one per row."""
    crop_size: int | None = None
    """Side of a view in pixels; the same as --recipe.crop-size."""
    seed: int = 0
    """Random seed for sample order, crops and masks, as in training."""
    device: str = "cpu"
    """Device that makes the views: cpu or cuda."""


@dataclass(frozen=True)
class Order:
    """Print how well an epoch is shuffled, compared with a perfect shuffle."""

    data: str = tyro.MISSING
    """Dataset folder: a local path or an s3:// URL."""
    batch_size: int = 256
    """Samples per batch; reduced to the size of the dataset if that is smaller."""
    samples: int = 100_000
    """Number of samples to analyze, from the start of the epoch."""
    seed: int = 0
    """Random seed for the sample order, as in training."""


def main() -> None:
    run_subcommand({"preview": preview, "order": order}, __doc__)


def preview(argv: list[str]) -> None:
    options = parse(Preview, argv, named={"recipe": RECIPES})
    recipe = options.recipe
    if options.crop_size is not None:
        recipe = dataclasses.replace(recipe, crop_size=options.crop_size)
    rows = write_preview(
        options.data, recipe, options.out, options.samples, options.seed, options.device
    )
    print(f"{options.out}, {options.out.with_suffix('.html').name}: {format_count(rows, 'sample')}")


def order(argv: list[str]) -> None:
    options = parse(Order, argv)
    batch_size = min(options.batch_size, len(ShardDataset.open(options.data)))
    print(describe_shuffle(options.data, batch_size, options.samples, options.seed))


def start() -> None:
    run(main, decodes=True)


if __name__ == "__main__":
    start()
