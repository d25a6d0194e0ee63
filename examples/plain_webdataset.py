"""The shards without any of this project: webdataset and torchvision in a DataLoader.

python examples/plain_webdataset.py out/photos
"""

import glob
import sys

import torch
import webdataset
from torchvision.transforms import v2

CROP = 112


def loader(folder: str, batch_size: int = 32) -> webdataset.WebLoader:
    """Batches of image (N, 3, CROP, CROP) uint8, saliency (N, 28, 28) in 0 .. 1, and label (N,)."""
    to_image = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(CROP, antialias=True)])
    to_map = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def sample(one: dict) -> tuple:
        image = next(one[name] for name in ("jpg", "png", "webp") if name in one)
        saliency = to_map(one["saliency.png"].convert("L"))[0]
        return to_image(image.convert("RGB")), saliency, int(one["cls"])

    shards = sorted(glob.glob(f"{folder}/shards/*.tar"))
    data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(500).decode("pil")
    return webdataset.WebLoader(data.map(sample).batched(batch_size), batch_size=None)


def main() -> None:
    for image, saliency, label in loader(sys.argv[1]):
        print(tuple(image.shape), tuple(saliency.shape), label[:8].tolist())


if __name__ == "__main__":
    main()
