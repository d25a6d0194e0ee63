"""Extract features of labeled images with a frozen encoder."""

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipeline import Cache, EvalViews, Recipe
from schemas import ShardDataset, UserError
from schemas.precision import Precision, autocast, pick_precision
from train.distributed import gather_uneven, is_main, rank, world_size


def open_labeled(url: str) -> ShardDataset:
    """Open a dataset to evaluate on. Raise UserError if labels are missing or all equal."""
    dataset = ShardDataset.open(url)
    if len(dataset) == 0:
        raise UserError(f"{url}: holds no images")
    labels = dataset.samples["label"].to_pylist()
    unlabeled = sum(label < 0 for label in labels)
    if unlabeled:
        raise UserError(
            f"{url}: {unlabeled} of {len(dataset)} images have no label; an evaluation needs "
            "labels (DATASET=folder takes the names of the subfolders)"
        )
    if len(set(labels)) == 1:
        raise UserError(f"{url}: all images have the same class; evaluate on a dataset with labels")
    return dataset


def open_labeled_pair(url: str, test_url: str | None) -> tuple[ShardDataset, ShardDataset | None]:
    """Open the training and the test set. Raise UserError if their classes differ."""
    train_set = open_labeled(url)
    test_set = open_labeled(test_url) if test_url else None
    if test_set is not None and test_set.classes != train_set.classes:
        raise UserError(f"{test_url}: has other classes than {url}")
    return train_set, test_set


def build_eval_recipe(metadata: dict[str, str]) -> Recipe:
    """Build the recipe for evaluation images: the encoder's crop size and its high-pass filter.

    An encoder that was pretrained on high-pass images is trained and tested on high-pass images
    (released code of saliency-guided masking, main_lincls.py); any other on unfiltered ones.
    """
    return remove_masks(
        Recipe(
            crop_size=int(metadata["crop_size"]),
            grid=1,
            soft_blur_probability=0.0,
            high_pass=metadata["high_pass"] == "True",
            high_pass_kernel=int(metadata["high_pass_kernel"]),
            high_pass_sigma=float(metadata["high_pass_sigma"]),
        )
    )


def remove_masks(recipe: Recipe) -> Recipe:
    """Return the recipe without its masks; crop size and high-pass filter stay."""
    return replace(recipe, fill="none", hard_negatives=0)


def open_eval_views(
    url: str, recipe: Recipe, device: torch.device, batch_size: int, cache: Cache | None = None
) -> EvalViews:
    """Open this rank's share of a dataset: center crops at the recipe's size, with its filter."""
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


def pick_eval_precision(
    precision: str, metadata: Mapping[str, str], device: torch.device
) -> Precision:
    """Return the precision of an evaluation: with `auto`, an fp32 encoder is evaluated in fp32."""
    settings = json.loads(metadata.get("settings", "{}"))
    if precision == "auto" and settings.get("precision") == "fp32":
        return "fp32"
    return pick_precision(precision, device)


@torch.inference_mode()
def extract_features(
    encoder: nn.Module,
    recipe: Recipe,
    url: str,
    device: torch.device,
    batch_size: int,
    precision: str,
    cache: Cache | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute pooled features of the center crop of every image; batch statistics are frozen.

    The short side is first resized to 256 / 224 of the crop, as is usual. Ranks share the images,
    and all of them must call it.

    Args:
        encoder: (N, 3, H, W) -> (N, D). Stays in evaluation mode afterwards.
        recipe: provides the crop size and the high-pass filter.
        batch_size: images per forward pass on this rank; does not change the result.
        precision: bf16 or fp32.

    Returns:
        Features (N, D) float32, L2-normalized, and labels (N,) int64, on the device, on all ranks.
    """
    views = open_eval_views(url, recipe, device, batch_size, cache)
    encoder = encoder.to(device).to(memory_format=torch.channels_last).eval()
    features, labels = [], []
    for batch in tqdm(
        views, unit="batch", desc="features", disable=None if is_main() else True, leave=False
    ):
        with autocast(precision, device):
            pooled = encoder(batch.image)
        features.append(nn.functional.normalize(pooled.float(), dim=1))
        labels.append(batch.label)
    return gather_uneven(torch.cat(features)), gather_uneven(torch.cat(labels))
