"""Paste the masks of detected objects into their images."""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.models.detection.transform import GeneralizedRCNNTransform


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample each mask at the center of each pixel, bilinearly, as detectron2 does.

    torchvision resizes a mask to its box in whole pixels, which shifts the outlines of small
    objects; docs/detection.md gives the size of that error.

    Args:
        masks: (n, 1, m, m) float32 probabilities over the boxes.
        boxes: (n, 4) float32, x0 y0 x1 y1 in pixels, of positive width and height.
        size: (height, width) of the image.

    Returns:
        (n, 1, height, width) float32 probabilities, 0 outside the boxes.
    """
    height, width = size
    pasted = masks.new_zeros(len(masks), 1, height, width)
    if not len(masks):
        return pasted
    # sample one pixel around the box too: the outermost cells fade out half a cell beyond it
    first = (boxes[:, :2].floor() - 1).clamp(min=0).long().tolist()
    last = (boxes[:, 2:].ceil() + 1).long().tolist()
    for number, ((left, top), (right, bottom)) in enumerate(zip(first, last, strict=True)):
        columns = slice(left, min(right, width))
        rows = slice(top, min(bottom, height))
        x0, y0, x1, y1 = boxes[number]
        x = torch.arange(columns.start, columns.stop, device=boxes.device) + 0.5
        y = torch.arange(rows.start, rows.stop, device=boxes.device) + 0.5
        if not (len(x) and len(y)):
            continue
        grid_y, grid_x = torch.meshgrid((y - y0) / (y1 - y0), (x - x0) / (x1 - x0), indexing="ij")
        grid = 2 * torch.stack([grid_x, grid_y], dim=-1)[None] - 1  # -1 .. 1 over the box
        part = grid_sample(masks[number][None], grid, align_corners=False)
        pasted[number, :, rows, columns] = part[0]
    return pasted


class Transform(GeneralizedRCNNTransform):
    """Resize and normalize as torchvision does, but paste masks by `paste_masks`."""

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Scale detections back to the images' own sizes; in training there are none."""
        masks = [detections.pop("masks", None) for detections in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for detections, mask, size in zip(result, masks, original_image_sizes, strict=False):
            if mask is not None:
                detections["masks"] = paste_masks(mask, detections["boxes"], size)
        return result
