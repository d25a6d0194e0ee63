"""Faster and Mask R-CNN with a C4 backbone, out of torchvision's parts.

    image --> conv1 .. layer3 --> RPN, RoIAlign 14 x 14 --> layer4 --> norm --> mean --> class, box
                                                                            `--> deconv --> mask

This is detectron2's R50-C4 with MoCo's extra normalisation behind res5, as far as torchvision has a
place for it; docs/detection.md lists the differences. All layers train.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from schemas import UserError
from train.encoders import build_encoder, load_encoder, stem_of
from train.methods.method import Method, MethodConfig, Setup

STRIDE = 16  # of layer3's map
ROI_SIZE = 14
MASK_WIDTH = 256  # of the mask predictor's hidden layer


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(MethodConfig):
    """What is detected, with which encoder, at which sizes; numbers are detectron2's.

    No way to pretrain, so no name of `train --method`.
    """

    name: ClassVar[str] = "detection"

    path: str
    """The encoder's file, or the folder of its run; empty for random weights."""
    sha256: str
    """Of the file: a training goes on with no other."""
    masks: bool
    """Whether objects have masks too (Mask R-CNN)."""
    short_sides: tuple[int, ...]
    """Pixels of the short side in training, one drawn for each image."""
    test_side: int = 800
    """Pixels of the short side in tests."""
    long_side: int = 1333
    """Pixels of the long side at most."""
    rois: int = 512
    """Proposals of a picture that losses are taken on."""
    proposals: int = 1000
    """Proposals of a picture that are classified in tests."""

    def build(self, setup: Setup) -> "Detector":
        return Detector(self, setup)


class Body(nn.Module):
    """The encoder up to layer3."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(name, getattr(encoder, name))
        self.out_channels = last_width(encoder.get_submodule("layer3"))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class RoIHead(nn.Module):
    """layer4 and the extra norm on RoI features: (R, C, 14, 14) -> maps (R, D, 7, 7)."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4
        self.width = last_width(layer4)
        self.norm = nn.BatchNorm2d(self.width)

    def maps(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean(dim=(2, 3))


class SharedMaps(nn.Module):
    """The RoI head's maps for the mask branch: the same weights, as in C4, registered once."""

    def __init__(self, head: RoIHead) -> None:
        super().__init__()
        self.head = (head,)

    def forward(self, x: Tensor) -> Tensor:
        return self.head[0].maps(x)


class AlignedRoIs(MultiScaleRoIAlign):
    """RoIAlign of one map with the half-pixel offset (detectron2's RoIAlignV2)."""

    def __init__(self) -> None:
        super().__init__(["0"], ROI_SIZE, sampling_ratio=-1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        return roi_align(
            x["0"].float(),
            boxes,
            ROI_SIZE,
            spatial_scale=1 / STRIDE,
            sampling_ratio=-1,
            aligned=True,
        )


class Detector(Method):
    """Reads `images` and `targets` of a batch: lists of tensors, of torchvision's dicts."""

    file = "detector.safetensors"

    def __init__(self, config: DetectorConfig, setup: Setup) -> None:
        super().__init__()
        if config.path:
            encoder, metadata, _ = load_encoder(config.path)
            if stem_of(metadata) != "imagenet":
                raise UserError(f"{config.path}: has the small stem; detection needs torchvision's")
        else:
            encoder, _ = build_encoder(setup.encoder)
        body, head = Body(encoder), RoIHead(encoder.get_submodule("layer4"))
        anchors = AnchorGenerator(
            sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),)
        )
        options: dict[str, Any] = dict(
            min_size=(*config.short_sides, config.test_side),
            max_size=config.long_side,
            rpn_anchor_generator=anchors,
            rpn_pre_nms_top_n_train=12000,
            rpn_pre_nms_top_n_test=6000,
            rpn_post_nms_top_n_train=2000,
            rpn_post_nms_top_n_test=config.proposals,
            box_batch_size_per_image=config.rois,
            box_roi_pool=AlignedRoIs(),
            box_head=head,
            box_predictor=FastRCNNPredictor(head.width, setup.classes + 1),
        )
        self.network: FasterRCNN
        if config.masks:
            self.network = MaskRCNN(
                body,
                mask_roi_pool=AlignedRoIs(),
                mask_head=SharedMaps(head),
                mask_predictor=MaskRCNNPredictor(head.width, MASK_WIDTH, setup.classes + 1),
                **options,
            )
        else:
            self.network = FasterRCNN(body, **options)
        self.sides = config.short_sides, config.test_side

    def train(self, mode: bool = True) -> "Detector":
        """In training one short side is drawn, in tests there is one."""
        super().train(mode)
        self.network.transform.min_size = self.sides[0] if mode else (self.sides[1],)
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = self.network(batch.images, batch.targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.inference_mode()
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """(3, H, W) float32 in 0 .. 1 -> boxes, labels (from 1), scores [and masks] of each."""
        return self.network(images)

    def exported(self) -> nn.Module:
        return self.network

    def sheet(self, batch: Any, recipe: Any) -> None:
        return None


def last_width(layer: nn.Module) -> int:
    """Channels that a stage of a ResNet puts out."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
