"""Batches of pictures for a detector, endless and exactly resumable."""

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
from train.evaluate.detection.data import Picture, Pictures


@dataclass(frozen=True)
class DetectionBatch:
    """Pictures (3, H, W) float32 in 0 .. 1, and torchvision's targets, on the device."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    sample_keys: list[str]


Sample = tuple[Tensor, dict[str, Tensor], str]
"""Of a picture: the image, its target, its key."""


def image_of(one: Picture) -> Tensor:
    """(3, H, W) float32 in 0 .. 1; EXIF orientation is left alone, as annotations mean it.

    Raises:
        UserError: it cannot be decoded, or is not as large as its annotation says.
    """
    try:
        with Image.open(one.path) as image:
            pixels = pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{one.path}: cannot be decoded ({error})") from error
    _, height, width = pixels.shape
    if (height, width) != one.size:
        raise UserError(
            f"{one.path}: has {height} x {width} pixels, but {one.size[0]} x {one.size[1]} by its "
            "annotation"
        )
    return pixels.float().div_(255)


def masks_of(one: Picture) -> np.ndarray:
    """(n, H, W) uint8: polygons and run lengths as pixels."""
    height, width = one.size
    found = []
    for mask in one.masks:
        encoded = mask
        if isinstance(mask, list):
            encoded = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
        elif isinstance(mask["counts"], list):
            encoded = coco_mask.frPyObjects(mask, height, width)
        found.append(coco_mask.decode(encoded))
    return np.stack(found) if found else np.zeros((0, height, width), np.uint8)


class Flipped(Dataset):
    """(place in the stream, picture) -> image and target, half of them mirrored.

    Whether is drawn from the seed and the place alone, so that workers do not matter.
    """

    def __init__(self, pictures: list[Picture], masks: bool, seed: int) -> None:
        self.pictures, self.masks, self.seed = pictures, masks, seed

    def __getitem__(self, item: tuple[int, int]) -> Sample | UserError:
        """An error is returned: torch would put a worker's traceback into its message."""
        try:
            return self.sample(*item)
        except UserError as error:
            return error

    def sample(self, place: int, index: int) -> Sample:
        one = self.pictures[index]
        image = image_of(one)
        kept = one.trains
        boxes = torch.from_numpy(one.boxes[kept])
        target = {"boxes": boxes, "labels": torch.from_numpy(one.labels[kept])}
        if self.masks:
            target["masks"] = torch.from_numpy(masks_of(one)[kept])
        if random.Random(f"{self.seed} {place}").random() < 0.5:
            image = image.flip(2)
            x0, y0, x1, y1 = boxes.unbind(1)
            width = image.shape[2]
            target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
            if self.masks:
                target["masks"] = target["masks"].flip(2)
        return image, target, one.path.stem


def as_lists(batch: list[Sample | UserError]) -> list[tuple[Any, ...]] | UserError:
    """Samples as images, targets, keys; or the first error among them."""
    samples = []
    for one in batch:
        if isinstance(one, UserError):
            return one
        samples.append(one)
    return list(zip(*samples, strict=True))


class DetectionViews:
    """What the training loop asks of a loader (`train.data.Views`).

    Pictures are shuffled anew in each pass; a batch may lie across two of them. An epoch of the
    loop is `unit` steps, whatever the number of pictures.
    """

    cache_description = ""

    def __init__(
        self,
        data: Pictures,
        *,
        batch_size: int,
        unit: int,
        workers: int,
        device: torch.device,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.pictures = data.trainable()
        self.samples, self.dropped = len(self.pictures), 0
        self.unit, self.device, self.seed, self.step = unit, device, seed, 0
        self.share = (batch_size, rank, world_size)
        self.workers = workers
        self.set = Flipped(self.pictures, data.masks, seed)
        self.stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.unit

    def order(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (place, picture) of this rank, from the step under way on."""
        size, rank, world_size = self.share
        step, pass_number, permutation = self.step, -1, torch.empty(0)
        while True:
            batch = []
            for number in range(size):
                place = (step * world_size + rank) * size + number
                if place // self.samples != pass_number:
                    pass_number = place // self.samples
                    generator = torch.Generator().manual_seed(1_000_003 * self.seed + pass_number)
                    permutation = torch.randperm(self.samples, generator=generator)
                batch.append((place, int(permutation[place % self.samples])))
            yield batch
            step += 1

    def __iter__(self) -> Iterator[DetectionBatch]:
        if self.stream is None:
            order: Any = self.order()
            loader = DataLoader(
                self.set,
                batch_sampler=order,
                num_workers=self.workers,
                collate_fn=as_lists,
                generator=torch.Generator(),  # so that making it draws nothing of torch's own
            )
            self.stream = iter(loader)
        for _ in range(self.unit - self.step % self.unit):
            batch = next(self.stream)
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
        self.step, self.stream = state["step"], None

    def close(self) -> None:
        """End the processes that read ahead; torch waits seconds for them when Python ends."""
        self.stream = None
