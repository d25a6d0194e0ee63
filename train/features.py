"""Images -> features of a frozen encoder."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import Cache, EvalViews, Recipe
from schemas import ShardDataset, UserError
from train.config import autocast, pick_precision
from train.distributed import gather_uneven, is_main, rank, world_size


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


def labelled_pair(url: str, test_url: str | None) -> tuple[ShardDataset, ShardDataset | None]:
    """Open what is known and what is to be classified. Raises UserError if their classes differ."""
    known, asked = labelled(url), labelled(test_url) if test_url else None
    if asked is not None and asked.classes != known.classes:
        raise UserError(f"{test_url}: has other classes than {url}")
    return known, asked


def recipe_of(metadata: dict[str, str]) -> Recipe:
    """How an encoder is shown whole images: its own crop size, and its own recipe's filter.

    An encoder that was pretrained on high-pass images is evaluated on such, train and test images
    alike (released code of saliency-guided masking, main_lincls.py); any other on plain ones.
    """
    return unmasked(
        Recipe(
            crop_size=int(metadata["crop_size"]),
            grid=1,
            soft_blur_probability=0.0,
            high_pass=metadata["high_pass"] == "True",
            high_pass_kernel=int(metadata["high_pass_kernel"]),
            high_pass_sigma=float(metadata["high_pass_sigma"]),
        )
    )


def unmasked(recipe: Recipe) -> Recipe:
    """The recipe without its masks: its crop size and its filter stay."""
    return replace(recipe, fill="none", hard_negatives=0)


def plain_views(
    url: str, recipe: Recipe, device: torch.device, batch_size: int, cache: Cache | None = None
) -> EvalViews:
    """This rank's share of a dataset: centre crops at the recipe's size, through its filter."""
    return EvalViews(
        url,
        batch_size=batch_size,
        device=device.type,
        rank=rank(),
        world_size=world_size(),
        crop_size=recipe.crop_size,
        recipe=recipe,
        cache=cache,
    )


@torch.inference_mode()
def extract(
    encoder: nn.Module,
    recipe: Recipe,
    url: str,
    device: torch.device,
    batch_size: int,
    precision: str = "auto",
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Pooled features of every image of a dataset, centre-cropped; batch statistics are frozen.

    The short side is resized to 256 / 224 of the crop before, as the field does. Ranks share the
    images; called by all of them.

    Args:
        encoder: (N, 3, H, W) -> (N, D). Is left in evaluation mode.
        recipe: its crop size and its filter count.
        batch_size: images at a time on this rank; changes no result.

    Returns:
        Features (N, D) float32, L2-normalised, and labels (N,) int64, on the device, on all ranks.
    """
    views = plain_views(url, recipe, device, batch_size, cache)
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    precision = pick_precision(precision, device)
    features, labels = [], []
    for batch in tqdm(
        views, unit="batch", desc="features", disable=None if is_main() else True, leave=False
    ):
        with autocast(precision, device):
            pooled = encoder(batch.image)
        features.append(nn.functional.normalize(pooled.float(), dim=1))
        labels.append(batch.label)
    return gather_uneven(torch.cat(features)), gather_uneven(torch.cat(labels))
