"""Look at what the encoder is fed.

python -m pipeline preview --data URL --recipe hp --out preview.png
python -m pipeline order --data URL --batch-size 256
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from pipeline.preview import write_preview
from pipeline.recipes import RECIPES, Recipe
from pipeline.shuffle_quality import describe
from schemas import ShardDataset, UserError
from schemas.cli import parse, run


@dataclass(frozen=True)
class Preview:
    """Write a contact sheet: a row a sample, with its image, its saliency and its views as fed."""

    data: str = tyro.MISSING
    """The dataset's folder: a plain path or s3://."""
    recipe: Recipe = field(default_factory=lambda: RECIPES["hp"])
    """Single values of the recipe, on top of the named one."""
    out: Path = Path("preview.png")
    """The PNG to write; the same as a web page lies beside it, .html."""
    samples: int = 12
    """Rows."""
    crop_size: int | None = None
    """Side of a view in pixels; short for --recipe.crop-size."""
    seed: int = 0
    """Of everything drawn, as in training."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Order:
    """Print how well an epoch is shuffled, beside a perfect shuffle."""

    data: str = tyro.MISSING
    """The dataset's folder: a plain path or s3://."""
    batch_size: int = 256
    """Samples a batch; all of a smaller dataset."""
    samples: int = 100_000
    """How much of the epoch is looked at."""
    seed: int = 0
    """Of the order, as in training."""


def main() -> int:
    commands = {"preview": preview, "order": order}
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip() if __doc__ else "")
        return 0
    if name not in commands:
        raise UserError(f"unknown command {name!r}: there are {', '.join(commands)}")
    return commands[name](argv)


def preview(argv: list[str]) -> int:
    options = parse(Preview, argv, named={"recipe": RECIPES})
    recipe = options.recipe
    if options.crop_size is not None:
        recipe = dataclasses.replace(recipe, crop_size=options.crop_size)
    rows = write_preview(
        options.data, recipe, options.out, options.samples, options.seed, options.device
    )
    print(f"{options.out}, {options.out.with_suffix('.html').name}: {rows} samples")
    return 0


def order(argv: list[str]) -> int:
    options = parse(Order, argv)
    size = min(options.batch_size, len(ShardDataset.open(options.data)))
    print(describe(options.data, size, options.samples, options.seed))
    return 0


def start() -> None:
    run(main, decodes=True)


if __name__ == "__main__":
    start()
