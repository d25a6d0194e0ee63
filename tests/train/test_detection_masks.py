"""Pasted masks against the formula at each pixel, and against true ellipses."""

import numpy as np
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from train.evaluate.detection.masks import Transform, paste_masks

SIDE = 48  # side of the image
CELLS = 14  # side of the C4 head's masks
FINE = 16  # points along the side of a cell


def at(mask: np.ndarray, y: float, x: float) -> float:
    """Sample a mask over 0 .. 1 at a point: bilinear between cell centers, 0 outside."""
    y, x = y * len(mask) - 0.5, x * len(mask) - 0.5
    total = 0.0
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < len(mask) and 0 <= column < len(mask):
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * mask[row, column]
    return total


def test_each_pixel_samples_the_mask_at_its_center() -> None:
    random = np.random.default_rng(0)
    masks = random.random((3, 1, 5, 5)).astype(np.float32)
    # inside the image; across its left and top; across its right and bottom
    boxes = np.array([[3.2, 4.7, 13.9, 9.1], [-4.5, -2.0, 6.0, 8.5], [15.5, 10.2, 30.0, 22.0]])
    pasted = paste_masks(torch.tensor(masks), torch.tensor(boxes, dtype=torch.float32), (16, 20))
    assert pasted.shape == (3, 1, 16, 20)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        for row in range(16):
            for column in range(20):
                y, x = (row + 0.5 - y0) / (y1 - y0), (column + 0.5 - x0) / (x1 - x0)
                found = pasted[number, 0, row, column].item()
                if 0 <= min(x, y) <= max(x, y) <= 1:
                    assert abs(found - at(masks[number, 0], y, x)) < 1e-5, (number, row, column)
                else:  # fades out: never above one half
                    assert found <= 0.5, (number, row, column)
    away = pasted[0, 0].clone()
    away[3:11, 1:16] = 0
    assert not away.any()


def ellipses(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return the masks of a perfect head, their boxes, and the pixels of the ellipses."""
    random = np.random.default_rng(0)
    masks, boxes, pixels = [], [], []
    fine = (np.arange(CELLS * FINE) + 0.5) / (CELLS * FINE) * 2 - 1
    inside = (fine[:, None] ** 2 + fine**2 <= 1).astype(np.float32)
    mask = inside.reshape(CELLS, FINE, CELLS, FINE).mean((1, 3))  # covered share of each cell
    middle = np.arange(SIDE) + 0.5
    for _ in range(count):
        width, height = random.uniform(10, 32, 2)
        x0, y0 = random.uniform(2, SIDE - 2 - width), random.uniform(2, SIDE - 2 - height)
        x, y = (middle - x0 - width / 2) / (width / 2), (middle - y0 - height / 2) / (height / 2)
        masks.append(mask[None])
        boxes.append((x0, y0, x0 + width, y0 + height))
        pixels.append(y[:, None] ** 2 + x**2 <= 1)
    stacked = torch.tensor(np.stack(masks))
    return stacked, torch.tensor(boxes, dtype=torch.float32), np.stack(pixels)


def mean_iou(pasted: torch.Tensor, pixels: np.ndarray) -> float:
    found = pasted[:, 0].numpy() > 0.5
    both = (found & pixels).sum((1, 2)) / (found | pixels).sum((1, 2))
    return float(both.mean())


def test_small_ellipses_keep_their_outline() -> None:
    """Ellipses 10 to 32 pixels long at subpixel positions, compared with torchvision's way."""
    masks, boxes, pixels = ellipses()
    ours = mean_iou(paste_masks(masks, boxes, (SIDE, SIDE)), pixels)
    theirs = mean_iou(paste_masks_in_image(masks, boxes, (SIDE, SIDE)), pixels)
    assert ours > 0.98, (ours, theirs)
    assert theirs < 0.94, (ours, theirs)


def test_detections_are_scaled_to_the_image_size() -> None:
    transform = Transform((24,), 64, [0.0] * 3, [1.0] * 3).eval()
    masks, boxes, pixels = ellipses(4)
    result = [{"boxes": boxes / 2, "masks": masks}, {"boxes": boxes[:0], "masks": masks[:0]}]
    found = transform.postprocess(result, [(24, 24)] * 2, [(SIDE, SIDE)] * 2)
    torch.testing.assert_close(found[0]["boxes"], boxes)
    assert mean_iou(found[0]["masks"], pixels) > 0.95
    assert found[1]["masks"].shape == (0, 1, SIDE, SIDE)
