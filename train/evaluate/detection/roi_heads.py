"""The RoI heads of a C4 detector: detectron2's Res5ROIHeads with MoCo's extra norm.

    map of layer3 --> RoIAlign 14 x 14 --> layer4 --> norm --> mean --> class, box
                                                         `--> deconv --> mask

In training the maps are computed once, and masks are taken from the rows of positive proposals:
layer4 and the norm see one batch a step. In tests masks belong to the final boxes, which are new.
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

STRIDE = 16  # of layer3's map
ROI_SIZE = 14

Network = TypeVar("Network", bound=nn.Module)
Features = dict[str, Tensor]
Shapes = list[tuple[int, int]]


class AlignedRoIs(nn.Module):
    """RoIAlign of one map with the half-pixel offset (detectron2's RoIAlignV2)."""

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """A map (N, C, H, W), and for each image its (n, 4) boxes -> (sum of n, C, 14, 14)."""
        return roi_align(
            features["0"],
            boxes,
            ROI_SIZE,
            spatial_scale=1 / STRIDE,
            sampling_ratio=-1,
            aligned=True,
        )


class RoIHead(nn.Module):
    """layer4 and the extra norm on RoI features: (R, C, 14, 14) -> maps (R, D, 7, 7)."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.width = last_width(layer4)
        self.norm = nn.BatchNorm2d(self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class C4RoIHeads(RoIHeads):
    """torchvision's RoI heads, but boxes and masks share the maps of `box_head`.

    Args:
        mask_predictor: maps -> (R, classes, 14, 14) logits; None for boxes alone.
        options: torchvision's.
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
        """As torchvision's: (detections, {}) in tests, ([], losses) in training."""
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, targets)
        return self.detections(features, proposals, image_shapes), {}

    def maps(self, features: Features, boxes: list[Tensor]) -> Tensor:
        return self.box_head(self.box_roi_pool(features, boxes))

    def losses(
        self, features: Features, proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        chosen, matched, labels, regression = self.select_training_samples(proposals, targets)
        maps = self.maps(features, chosen)
        logits, deltas = self.box_predictor(maps.mean(dim=(2, 3)))
        of_class, of_box = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": of_class, "loss_box_reg": of_box}
        if self.mask_predictor is not None:
            positive = [of_image > 0 for of_image in labels]
            losses["loss_mask"] = maskrcnn_loss(
                self.mask_predictor(maps[torch.cat(positive)]),
                [boxes[rows] for boxes, rows in zip(chosen, positive, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [objects[rows] for objects, rows in zip(matched, positive, strict=True)],
            )
        return losses

    def detections(
        self, features: Features, proposals: list[Tensor], image_shapes: Shapes
    ) -> list[dict[str, Tensor]]:
        logits, deltas = self.box_predictor(self.maps(features, proposals).mean(dim=(2, 3)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        found = [
            {"boxes": b, "labels": c, "scores": s}
            for b, c, s in zip(boxes, labels, scores, strict=True)
        ]
        if self.mask_predictor is not None:
            masks = maskrcnn_inference(self.mask_predictor(self.maps(features, boxes)), labels)
            for one, of_image in zip(found, masks, strict=True):
                one["masks"] = of_image
        return found


def last_width(layer: nn.Module) -> int:
    """Channels that a stage of a ResNet puts out."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def in_float32(module: Network) -> Network:
    """The module, whose outputs are float32 whatever it computes in.

    Under autocast only what lies inside is bf16: boxes of some hundred pixels would lose whole
    pixels in it, so anchors, deltas, scores and all that is made of them stay float32.
    """
    module.register_forward_hook(lambda _module, _inputs, output: as_float32(output))
    return module


def as_float32(output: Any) -> Any:
    """A tensor, or nested lists and tuples of them."""
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(as_float32(part) for part in output)
