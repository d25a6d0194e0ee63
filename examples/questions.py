"""Answer questions from the tables; no image is opened.

python examples/questions.py out/photos
"""

import sys

import pyarrow as pa
import pyarrow.compute as pc

from schemas import ShardDataset


def find_largest_foreground(dataset: ShardDataset, count: int = 5) -> list[tuple[str, float, int]]:
    """Return the classes with the most foreground: (name, mean share of the cells, images)."""
    by_class = (
        dataset.samples.filter(pc.field("label") >= 0)
        .group_by("label")
        .aggregate([("foreground", "mean"), ("foreground", "count")])
        .sort_by([("foreground_mean", "descending")])
    )
    return [
        (dataset.classes[row["label"]], row["foreground_mean"], row["foreground_count"])
        for row in by_class.slice(0, count).to_pylist()
    ]


def select_wide_images(dataset: ShardDataset, ratio: float = 2.0) -> pa.Table:
    """Return key, width and height of images that are at least `ratio` times as wide as tall."""
    samples = dataset.samples
    shape = pc.divide(pc.cast(samples["width"], pa.float64()), samples["height"])
    return samples.filter(pc.greater_equal(shape, ratio)).select(["key", "width", "height"])


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DATASET")
    dataset = ShardDataset.open(sys.argv[1])
    print(f"{len(dataset)} images, {len(dataset.classes)} classes")
    for name, share, images in find_largest_foreground(dataset):
        print(f"{share:6.1%} of the cells are foreground in {name} ({images} images)")
    print(f"{len(select_wide_images(dataset))} images are at least twice as wide as tall")


if __name__ == "__main__":
    main()
