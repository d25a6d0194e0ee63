"""Build two loaders for other experiments from the parts of `pipeline`.

python examples/other_masks.py out/photos

`mask_as_mae` masks three quarters of 14 x 14 patches at random and ignores the saliency.
`crop_objects` yields crops around the object, which the stored saliency finds.
"""

import io
import sys
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline import MaskedViews, Recipe
from pipeline.masks import find_foreground
from schemas import Sample, ShardDataset

MAE = Recipe(
    pair=False,
    hard_negatives=0,
    high_pass=False,
    fill="mean",
    grid=14,
    query_mask="random",
    query_ratio=(0.75, 0.75),
    focal_probability=0.0,
    channel_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
    soft_blur_probability=0.0,
)


def mask_as_mae(
    url: str, batch_size: int = 32, device: str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch of (masked images, masks), each (N, 3, 224, 224); True where masked."""
    for batch in MaskedViews(url, MAE, batch_size, device, report=("masks",)):
        assert batch.query_mask is not None
        yield batch.query, batch.query_mask


def crop_objects(
    url: str, side: int = 224, margin: float = 0.1
) -> Iterator[tuple[Image.Image, int]]:
    """Yield each image cut to the box of its foreground with a margin: (image, label)."""
    for sample in ShardDataset.open(url):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(sample.image))).convert("RGB")
        yield image.resize((side, side), box=compute_object_box(sample, margin)), sample.label


def compute_object_box(sample: Sample, margin: float) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 in pixels around the most salient third of the map."""
    front = find_foreground(torch.from_numpy(sample.saliency)[None], margin=-0.5)[0].numpy()
    rows, columns = np.nonzero(front)
    grid = len(front)
    x0, x1 = columns.min() / grid - margin, (columns.max() + 1) / grid + margin
    y0, y1 = rows.min() / grid - margin, (rows.max() + 1) / grid + margin
    return (
        max(0.0, x0) * sample.width,
        max(0.0, y0) * sample.height,
        min(1.0, x1) * sample.width,
        min(1.0, y1) * sample.height,
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DATASET")
    for images, masks in mask_as_mae(sys.argv[1]):
        print(tuple(images.shape), f"{masks[:, 0].float().mean():.0%} masked")
    for image, label in crop_objects(sys.argv[1]):
        print(image.size, label)
        break


if __name__ == "__main__":
    main()
