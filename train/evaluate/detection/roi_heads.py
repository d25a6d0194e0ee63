"""RoI heads of a C4 detector: detectron2's Res5ROIHeads with MoCo's extra norm.

    map of layer3 --> RoIAlign 14 x 14 --> layer4 --> norm --> mean --> class, box
                                                         `--> deconv --> mask

In training the maps are computed once, and masks use the rows of positive proposals, so layer4 and
the norm see one batch per step. In tests masks are computed for the final boxes, which are new.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
)
from torchvision.ops import roi_align

STRIDE = 16
"""Stride of layer3's map in pixels."""
ROI_SIZE = 14

Network = TypeVar("Network", bound=nn.Module)
Features = dict[str, Tensor]
Shapes = list[tuple[int, int]]


class AlignedRoIs(nn.Module):
    """RoIAlign on one map with the half-pixel offset (detectron2's RoIAlignV2)."""

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """Pool a map (N, C, H, W) in the (n, 4) boxes of each image -> (sum of n, C, 14, 14)."""
        return roi_align(
            features["0"],
            boxes,
            ROI_SIZE,
            spatial_scale=1 / STRIDE,
            sampling_ratio=-1,
            aligned=True,
        )


class RoIHead(nn.Module):
    """layer4 and the extra norm for RoI features: (R, C, 14, 14) -> maps (R, D, 7, 7)."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.width = get_output_channels(layer4)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class C4RoIHeads(RoIHeads):
    """torchvision's RoI heads, except that boxes and masks share the maps of `box_head`.

    Args:
        mask_predictor: maps -> (R, classes, 14, 14) logits; None to predict only boxes.
        options: options of torchvision's class.
    """

    def __init__(self, *, mask_predictor: nn.Module | None, **options: Any) -> None:
        super().__init__(box_roi_pool=AlignedRoIs(), **options)
        self.mask_predictor = mask_predictor

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return (detections, {}) in tests and ([], losses) in training, as torchvision does."""
        if self.training:
            assert targets is not None
            return [], self.compute_losses(features, proposals, targets)
        return self.detect(features, proposals, image_shapes), {}

    def compute_maps(self, features: Features, boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.box_roi_pool(features, boxes))

    def compute_losses(
        self, features: Features, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        chosen, matched, labels, regression = self.select_training_samples(proposals, targets)
        maps = self.compute_maps(features, chosen)
        logits, deltas = self.box_predictor(maps.mean(dim=(2, 3)))
        class_loss, box_loss = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.mask_predictor is not None:
            positive = [image_labels > 0 for image_labels in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(maps[torch.cat(positive)]),
                [boxes[rows] for boxes, rows in zip(chosen, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [objects[rows] for objects, rows in zip(matched, positive, strict=True)],
            )
        return losses

    def detect(
        self, features: Features, proposals: list[Tensor], image_shapes: Shapes
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self.box_predictor(self.compute_maps(features, proposals).mean(dim=(2, 3)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        detections = [
            {"boxes": b, "labels": c, "scores": s}
            for b, c, s in zip(boxes, labels, scores, strict=True)
        ]
        if self.mask_predictor is not None:
            mask_logits = self.mask_predictor(self.compute_maps(features, boxes))
            masks = maskrcnn_inference(mask_logits, labels)
            for detection, image_masks in zip(detections, masks, strict=True):
                detection["masks"] = image_masks
        return detections


def get_output_channels(layer: nn.Module) -> int:
    """Return the number of output channels of a ResNet's stage."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def return_float32_(module: Network) -> Network:
    """Make the module return float32 whatever precision it computes in; return the module.

    Under autocast only its inner computation is bf16: boxes of some hundred pixels would be off by
    whole pixels in bf16, so anchors, deltas, scores and all that follows from them stay float32.
    """
    module.register_forward_hook(lambda _module, _inputs, output: to_float32(output))
    return module


def to_float32(output: Any) -> Any:
    """Convert a tensor, or nested lists and tuples of tensors, to float32."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(to_float32(part) for part in output)
