"""Images -> features of a frozen encoder."""

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import PlainViews, Recipe
from schemas import ShardDataset, UserError
from train.config import autocast, pick_precision


def labelled(url: str) -> ShardDataset:
    """Open a dataset to evaluate on. Raises UserError when it has none or one class."""
    dataset = ShardDataset.open(url)
    if len(dataset) == 0:
        raise UserError(f"{url}: holds no images")
    labels = dataset.samples["label"].to_pylist()
    unlabelled = sum(label < 0 for label in labels)
    if unlabelled:
        raise UserError(
            f"{url}: {unlabelled} of {len(dataset)} images have no label; an evaluation needs "
            "labelled ones (DATASET=folder takes the names of the subfolders)"
        )
    if len(set(labels)) == 1:
        raise UserError(f"{url}: has images of one class alone; an accuracy on it says nothing")
    return dataset


def image_wide_filter(metadata: dict[str, str]) -> Recipe:
    """The filter that an encoder's own recipe put over whole images.

    An encoder that was pretrained on high-pass images is evaluated on such, train and test images
    alike (released code of saliency-guided masking, main_lincls.py); any other on plain ones.
    """
    return Recipe(
        high_pass=metadata["high_pass"] == "True",
        high_pass_kernel=int(metadata["high_pass_kernel"]),
        high_pass_sigma=float(metadata["high_pass_sigma"]),
    )


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    metadata: dict[str, str],
    url: str,
    device: torch.device,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Pooled features of every image of a dataset, centre-cropped, batch statistics frozen.

    The short side is resized to 256 / 224 of the crop before, as the field does.

    Args:
        encoder: (N, 3, H, W) -> (N, D).
        metadata: its `crop_size` and high-pass filter.

    Returns:
        Features (N, D) float32, L2-normalised, and labels (N,) int64, on the device.
    """
    views = PlainViews(
        url,
        batch_size=batch_size,
        device=device.type,
        crop_size=int(metadata["crop_size"]),
        recipe=image_wide_filter(metadata),
    )
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    precision = pick_precision("auto", device)
    features, labels = [], []
    for batch in tqdm(views, unit="batch", desc="features", disable=None, leave=False):
        with autocast(precision, device):
            pooled = encoder(batch.image)
        features.append(nn.functional.normalize(pooled.float(), dim=1))
        labels.append(batch.label)
    return torch.cat(features), torch.cat(labels)
