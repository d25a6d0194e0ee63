"""Read the shards without this project: webdataset and torchvision in a DataLoader.

python examples/plain_webdataset.py out/photos
"""

import glob
import io
import sys

import torch
import webdataset
from PIL import Image, ImageOps
from torch.nn.functional import adaptive_avg_pool2d
from torchvision import tv_tensors
from torchvision.transforms import v2

CROP, GRID = 112, 7
CROP_AND_FLIP = v2.Compose([v2.RandomResizedCrop(CROP, antialias=True), v2.RandomHorizontalFlip()])
TYPES = ("jpg", "png", "webp", "bmp", "tiff", "jp2", "pnm")


def make_view(sample: dict) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a crop (3, CROP, CROP) uint8, its foreground (GRID, GRID) bool, and the label."""
    (content,) = (sample[name] for name in TYPES if name in sample)
    image = v2.functional.to_image(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    png = v2.functional.to_image(Image.open(io.BytesIO(sample["saliency.png"])))
    # Resize the map to the image, so that one random crop and flip apply to both.
    resized = v2.functional.resize(png.float(), list(image.shape[-2:]))
    image, saliency = CROP_AND_FLIP(v2.functional.grayscale_to_rgb(image), tv_tensors.Mask(resized))
    cells = adaptive_avg_pool2d(saliency, GRID)[0]
    return image, cells >= cells.mean() - 0.6 * cells.std(correction=0), int(sample["cls"])


def build_loader(folder: str, batch_size: int = 32) -> webdataset.WebLoader:
    """Return a loader of batches of views, with a further shuffle in memory."""
    shards = sorted(glob.glob(f"{folder}/shards/*.tar"))
    if not shards:
        sys.exit(f"{folder}: has no shards/*.tar; give the folder of a dataset")
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(500).map(make_view)
    return webdataset.WebLoader(data.batched(batch_size), batch_size=None)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} DATASET")
    for image, foreground, label in build_loader(sys.argv[1]):
        share = foreground.float().mean()
        print(tuple(image.shape), f"{share:.0%} of the cells are foreground,", label[:8].tolist())


if __name__ == "__main__":
    main()
