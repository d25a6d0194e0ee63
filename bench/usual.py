"""Make masked views in the usual ways, as an experienced user of torchvision or webdataset would.

`build_pil_view` and `make_views_by_loops` follow the released code (method of the paper:
ImageFolder, PIL, a two-crop transform in worker processes, saliency of every crop by a ResNet-50,
masks by Python loops over images and cells), without its defects. `build_tensor_view` and
`load_webdataset` are what one would write today, with the masks of `make_views_vectorized`.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets, io, models, transforms, tv_tensors
from torchvision.transforms import v2

from bench.table import repeat_forever
from pipeline import Recipe, fills, masks
from pipeline.fused import MEAN, STD
from pipeline.rng import BatchRng
from schemas import UserError

Views = dict[str, Tensor]


class PilBlur:
    """The soft blur of MoCo v2."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


class TwoCrops:
    """Make two views and the blurred images that the fill needs, each (3, S, S) float32.

    Runs in a worker process.
    """

    def __init__(self, recipe: Recipe, view: Callable[[Any], Tensor]):
        self.recipe, self.view = recipe, view
        self.soft = transforms.GaussianBlur(recipe.high_pass_kernel, recipe.high_pass_sigma)
        self.strong = transforms.GaussianBlur(recipe.blur_kernel, recipe.blur_sigma)

    def __call__(self, image: Any) -> Views:
        return self.augment("query", image) | self.augment("key", image)

    def augment(self, name: str, image: Any) -> Views:
        view = self.view(image)
        views = {name: view - self.soft(view) if self.recipe.high_pass else view}
        if self.recipe.fill == "blur":
            views[f"{name}_blur"] = self.strong(view)
        return views


def build_pil_view(recipe: Recipe) -> Callable[[Image.Image], Tensor]:
    """Return MoCo v2's augmentation of a PIL image (main_moco.py --aug-plus)."""
    jitter = transforms.ColorJitter(
        recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue
    )
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.crop_size, recipe.crop_area),
            transforms.RandomApply([jitter], recipe.jitter_probability),
            transforms.RandomGrayscale(recipe.grayscale_probability),
            transforms.RandomApply([PilBlur(recipe.soft_blur_sigma)], recipe.soft_blur_probability),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def build_tensor_view(recipe: Recipe) -> v2.Compose:
    """Return the same augmentation with torchvision's v2 on uint8 tensors."""
    cut = v2.RandomResizedCrop(recipe.crop_size, recipe.crop_area, antialias=True)
    return v2.Compose([cut, v2.RandomHorizontalFlip(), build_color_transform(recipe)])


def build_color_transform(recipe: Recipe) -> v2.Compose:
    """Return the photometric part of the augmentation with torchvision's v2."""
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    soft = v2.GaussianBlur(13, recipe.soft_blur_sigma)
    return v2.Compose(
        [
            v2.RandomApply([jitter], recipe.jitter_probability),
            v2.RandomGrayscale(recipe.grayscale_probability),
            v2.RandomApply([soft], recipe.soft_blur_probability),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def load_folder(
    root: Path, recipe: Recipe, batch_size: int, workers: int, tensors: bool
) -> Iterator[Views]:
    """Yield batches of an image folder by worker processes: (3, S, S) views, stacked on the CPU."""
    views = TwoCrops(recipe, build_tensor_view(recipe) if tensors else build_pil_view(recipe))
    options: dict[str, Any] = {"loader": decode_file} if tensors else {}
    images = datasets.ImageFolder(str(root), views, **options)
    if len(images) < batch_size:  # repeating an empty loader would never end
        raise UserError(f"--batch-size {batch_size}: the dataset has only {len(images)} images")
    loader = DataLoader(
        images,
        batch_size,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )
    return (views for views, _ in repeat_forever(loader))


def decode_file(path: str) -> Tensor:
    return io.decode_image(path, io.ImageReadMode.RGB, apply_exif_orientation=True)


def load_webdataset(
    urls: list[str], recipe: Recipe, batch_size: int, workers: int
) -> Iterator[Views]:
    """Yield batches of the shards with webdataset: one window for image and saliency, then v2."""
    import webdataset  # imported here: it is one of the development packages

    cut = v2.RandomResizedCrop(recipe.crop_size, recipe.crop_area, antialias=True)
    flip = v2.RandomHorizontalFlip()
    views = TwoCrops(recipe, build_color_transform(recipe))

    def make_two_views(sample: dict[str, Any]) -> Views:
        image = next(sample[name] for name in ("jpg", "png", "webp") if name in sample)
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        # Resize the saliency to the image, so that one transform cuts both.
        saliency = torch.from_numpy(np.array(sample["saliency.png"].convert("L")))
        heat = v2.functional.resize(saliency.unsqueeze(0), list(image.shape[1:]))
        sample_views: Views = {}
        for name in ("query", "key"):
            crop, part = flip(cut(tv_tensors.Image(image), tv_tensors.Image(heat)))
            pooled = nn.functional.adaptive_avg_pool2d(part.float(), recipe.grid)
            sample_views[f"{name}_saliency"] = pooled.as_subclass(Tensor)[0]
            sample_views |= views.augment(name, crop.as_subclass(Tensor))
        return sample_views

    data = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
    data = data.shuffle(1000).decode("pil").map(make_two_views)
    data = data.batched(batch_size, default_collate, partial=False)
    loader = webdataset.WebLoader(
        data.repeat(), batch_size=None, num_workers=min(workers, len(urls)), persistent_workers=True
    )
    # Drop the keys of the samples, which webdataset adds.
    return ({name: batch[name] for name in batch if name != "__key__"} for batch in loader)


class Localizer:
    """Compute saliency the released way: a ResNet-50's last map of every crop, summed over
    channels.

    It runs in fp32 as released; the weights are random, because the speed does not depend on them.
    """

    def __init__(self, device: str, grid: int):
        self.grid = grid  # the network's own map is 7 x 7 at 224 pixels
        network = models.resnet50(weights=None)
        self.body = nn.Sequential(*list(network.children())[:-2]).to(device).eval()

    @torch.no_grad()
    def __call__(self, view: Tensor) -> np.ndarray:
        activations = self.body(view).sum(1)
        return nn.functional.adaptive_avg_pool2d(activations, self.grid).cpu().numpy()


def mask_by_loops(
    image: Tensor, saliency: np.ndarray, recipe: Recipe, hard: bool, blur: Tensor | None
) -> Tensor:
    """Return a masked batch, made by loops over images, cells and channels, as released."""
    result = image.clone()
    side, cell, cells = recipe.crop_size, recipe.cell, recipe.grid**2
    std = recipe.noise_hard_negative if hard else recipe.noise_query
    for index in range(len(image)):
        if random.random() < recipe.focal_probability:
            window = recipe.focal_side(recipe.focal_filled if hard else recipe.focal_kept)
            top, left = random.randint(0, side - window), random.randint(0, side - window)
            place = (index, slice(None), slice(top, top + window), slice(left, left + window))
            if hard:
                result[place] = std * torch.randn(3, window, window, device=image.device)
            else:
                result[index] = std * torch.randn(3, side, side, device=image.device)
                result[place] = image[place]
            continue
        ratio = random.uniform(*(recipe.hard_negative_ratio if hard else recipe.query_ratio))
        front, back = split_cells(saliency[index], recipe)
        share = ratio * len(front) / cells
        if recipe.foreground_cap and share >= recipe.foreground_cap[0]:
            share = recipe.foreground_cap[1]
        of_front = round(share * cells)
        of_back = 0 if hard else max(0, math.floor(ratio * cells) - of_front)
        by_channel = random.random() < recipe.channel_probability
        for channels in ([0], [1], [2]) if by_channel else ([0, 1, 2],):
            chosen = random.sample(front, of_front) + random.sample(back, of_back)
            for row, column in chosen:
                rows = slice(row * cell, (row + 1) * cell)
                columns = slice(column * cell, (column + 1) * cell)
                if recipe.fill == "noise":
                    size = (len(channels), cell, cell)
                    content = std * torch.randn(*size, device=image.device)
                elif blur is not None:
                    content = blur[index, channels, rows, columns]
                else:
                    content = image[index].mean((1, 2))[channels].view(-1, 1, 1)
                result[index, channels, rows, columns] = content
    return result


def split_cells(saliency: np.ndarray, recipe: Recipe) -> tuple[list[tuple[int, int]], ...]:
    """Return the (row, column) of the foreground's and of the background's cells."""
    threshold = saliency.mean() - recipe.foreground_margin * saliency.std()
    cells: tuple[list[tuple[int, int]], ...] = ([], [])
    for row in range(recipe.grid):
        for column in range(recipe.grid):
            cells[int(saliency[row, column] < threshold)].append((row, column))
    return cells


def make_views_by_loops(views: Views, recipe: Recipe, localizer: Localizer | None) -> list[Tensor]:
    """Return query, key and hard negative; the saliency is random if `localizer` is None."""
    masked_views = []
    for name, hard in (("query", False), ("key", True)):
        image = views[name]
        if localizer is None:
            saliency = np.random.default_rng().random((len(image), recipe.grid, recipe.grid))
        else:
            saliency = localizer(image)
        masked_views.append(mask_by_loops(image, saliency, recipe, hard, views.get(f"{name}_blur")))
    return [masked_views[0], views["key"], masked_views[1]]


def make_views_vectorized(views: Views, recipe: Recipe, rng: BatchRng) -> list[Tensor]:
    """Return the same for the whole batch at once, with the pipeline's masks and fills."""
    masked_views = []
    roles: tuple[tuple[str, masks.Role], ...] = (("query", "query"), ("key", "hard_negative"))
    for name, role in roles:
        image = views[name]
        shape = (len(image), recipe.grid, recipe.grid)
        own = rng.stream(role)
        saliency = views.get(f"{name}_saliency", own.uniform(*shape).float())
        drawn = masks.draw_masks(saliency, recipe, role, own)
        std = recipe.noise_query if role == "query" else recipe.noise_hard_negative
        blur = views.get(f"{name}_blur")
        fill = rng.stream("fill", 0 if role == "query" else 2)
        content = fills.FILLS[recipe.fill](image, recipe, std, fill) if blur is None else blur
        masked_views.append(torch.lerp(image, content, drawn.to_pixels(recipe.crop_size)))
    return [masked_views[0], views["key"], masked_views[1]]
