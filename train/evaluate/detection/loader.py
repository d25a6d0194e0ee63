"""Load batches of images for a detector, endlessly and exactly resumable."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from schemas import UserError
from train.evaluate.detection.data import AnnotatedImage, DetectionDataset


@dataclass(frozen=True)
class DetectionBatch:
    """Images (3, H, W) float32 in 0 .. 1, and torchvision's targets, on the device."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    sample_keys: list[str]


Sample = tuple[Tensor, dict[str, Tensor], str]
"""An image, its target and its key."""


def load_image(image: AnnotatedImage) -> Tensor:
    """Load an image as (3, H, W) float32 in 0 .. 1.

    EXIF orientation is not applied, because annotations refer to the stored pixels.

    Raises:
        UserError: the image cannot be decoded, or its size is not that of its annotation.
    """
    try:
        with Image.open(image.path) as file:
            pixels = pil_to_tensor(file.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{image.path}: cannot be decoded ({error})") from error
    _, height, width = pixels.shape
    if (height, width) != image.size:
        raise UserError(
            f"{image.path}: has {height} x {width} pixels, but {image.size[0]} x "
            f"{image.size[1]} by its annotation"
        )
    return pixels.float().div_(255)


def decode_masks(image: AnnotatedImage) -> np.ndarray:
    """Decode polygons and run lengths to pixels: (n, H, W) uint8."""
    height, width = image.size
    decoded = []
    for mask in image.masks:
        encoded = mask
        if isinstance(mask, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
        elif isinstance(mask["counts"], list):
            encoded = coco_mask.frPyObjects(mask, height, width)
        decoded.append(coco_mask.decode(encoded))
    return np.stack(decoded) if decoded else np.zeros((0, height, width), np.uint8)


class FlipDataset(Dataset):
    """(position in the stream, index of the image) -> image and target, half of them mirrored.

    The flip depends only on the seed and the position, so workers do not change it.
    """

    def __init__(self, images: list[AnnotatedImage], has_masks: bool, seed: int) -> None:
        self.images, self.has_masks, self.seed = images, has_masks, seed

    def __getitem__(self, item: tuple[int, int]) -> Sample | UserError:
        """Load a sample, or return the error; a raised one would get a worker's traceback."""
        try:
            return self.load_sample(*item)
        except UserError as error:
            return error

    def load_sample(self, position: int, index: int) -> Sample:
        annotated = self.images[index]
        image = load_image(annotated)
        kept = annotated.trains
        boxes = torch.from_numpy(annotated.boxes[kept])
        target = {"boxes": boxes, "labels": torch.from_numpy(annotated.labels[kept])}
        if self.has_masks:
            target["masks"] = torch.from_numpy(decode_masks(annotated)[kept])
        if random.Random(f"{self.seed} {position}").random() < 0.5:
            image = image.flip(2)
            x0, y0, x1, y1 = boxes.unbind(1)
            width = image.shape[2]
            target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
            if self.has_masks:
                target["masks"] = target["masks"].flip(2)
        return image, target, annotated.path.stem


def collate(batch: list[Sample | UserError]) -> list[tuple[Any, ...]] | UserError:
    """Collate samples into images, targets and keys; return the first error if there is one."""
    samples = []
    for sample in batch:
        if isinstance(sample, UserError):
            return sample
        samples.append(sample)
    return list(zip(*samples, strict=True))


def leave_process_group(_: int) -> None:
    """Keep signals to the trainer's process group, as Ctrl-C and `timeout` send, from a worker.

    The trainer saves the state after such a signal and needs further batches until then. A worker
    ends with the trainer, as torch's workers watch their parent.
    """
    os.setpgid(0, 0)


class DetectionLoader:
    """Loader for the trainer (see `train.data.Views`).

    Images are shuffled again in each pass over the dataset; a batch may span two passes. An epoch
    of the trainer has `epoch_steps` steps, whatever the number of images.
    """

    cache_description = ""

    def __init__(
        self,
        data: DetectionDataset,
        *,
        batch_size: int,
        epoch_steps: int,
        workers: int,
        device: torch.device,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.images = data.select_trainable()
        self.samples, self.dropped = len(self.images), 0
        self.epoch_steps, self.device, self.seed, self.step = epoch_steps, device, seed, 0
        self.share = (batch_size, rank, world_size)
        self.workers = workers
        self.dataset = FlipDataset(self.images, data.has_masks, seed)
        self.batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.epoch_steps

    def iterate_order(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches of (position, index of an image) for this rank from the current step on."""
        size, rank, world_size = self.share
        step, pass_number, permutation = self.step, -1, torch.empty(0)
        while True:
            batch = []
            for number in range(size):
                position = (step * world_size + rank) * size + number
                if position // self.samples != pass_number:
                    pass_number = position // self.samples
                    generator = torch.Generator().manual_seed(1_000_003 * self.seed + pass_number)
                    permutation = torch.randperm(self.samples, generator=generator)
                batch.append((position, int(permutation[position % self.samples])))
            yield batch
            step += 1

    def __iter__(self) -> Iterator[DetectionBatch]:
        if self.batches is None:
            order: Any = self.iterate_order()
            loader = DataLoader(
                self.dataset,
                batch_sampler=order,
                num_workers=self.workers,
                collate_fn=collate,
                worker_init_fn=leave_process_group,
                generator=torch.Generator(),  # keeps torch's global generator untouched
            )
            self.batches = iter(loader)
        for _ in range(self.epoch_steps - self.step % self.epoch_steps):
            batch = next(self.batches)
            if isinstance(batch, UserError):
                raise batch
            images, targets, keys = batch
            self.step += 1
            yield DetectionBatch(
                [image.to(self.device, non_blocking=True) for image in images],
                [{name: t.to(self.device) for name, t in target.items()} for target in targets],
                list(keys),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.batches = state["step"], None

    def close(self) -> None:
        """End the reading processes; otherwise torch waits seconds for them when Python ends."""
        self.batches = None
