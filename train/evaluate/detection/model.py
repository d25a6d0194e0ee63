"""Faster and Mask R-CNN with a C4 backbone, built from torchvision's parts.

    image --> conv1 .. layer3 --> RPN --> RoI heads (`roi_heads.py`)

This is detectron2's R50-C4 with MoCo's extra normalization after res5, as far as torchvision's
parts allow; docs/detection.md lists the differences. All layers are trained.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from pipeline.fused import MEAN, STD
from schemas import UserError
from train.encoders import build_encoder, get_stem, load_encoder
from train.evaluate.detection.masks import Transform
from train.evaluate.detection.roi_heads import (
    C4RoIHeads,
    RoIHead,
    get_output_channels,
    return_float32_,
)
from train.methods.method import Method, MethodConfig, Setup
from train.timm_encoders import is_timm_encoder

MASK_WIDTH = 256
"""Width of the mask predictor's hidden layer."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(MethodConfig):
    """Options of the detector; the numbers are detectron2's.

    It does not pretrain, so it is not a choice of `train --method`.
    """

    name: ClassVar[str] = "detection"
    free: ClassVar[frozenset[str]] = frozenset({"path"})
    epoch_name: ClassVar[str] = "part"

    path: str
    """File of the encoder, or folder of its run; empty for random weights."""
    sha256: str
    """sha256 of that file; resuming requires the same file."""
    masks: bool
    """Predict masks too (Mask R-CNN)."""
    short_sides: tuple[int, ...]
    """Short sides in pixels in training, one drawn for each image."""
    test_side: int = 800
    """Short side in pixels in tests."""
    long_side: int = 1333
    """Maximum long side in pixels."""
    rois: int = 512
    """Proposals per image on which losses are computed."""
    proposals: int = 1000
    """Proposals per image that are classified in tests."""

    def build(self, setup: Setup) -> "Detector":
        return Detector(self, setup)

    def describe_images(self) -> str:
        sides = dict.fromkeys([min(self.short_sides), max(self.short_sides)])
        return f"short sides of {' to '.join(map(str, sides))} px"


class Body(nn.Module):
    """The encoder up to layer3."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(name, getattr(encoder, name))
        self.out_channels = get_output_channels(encoder.get_submodule("layer3"))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


def build_rpn(width: int, proposals: int) -> RegionProposalNetwork:
    """Build the RPN for a map of `width` channels, with this number of proposals in tests."""
    anchors = AnchorGenerator(sizes=((32, 64, 128, 256, 512),), aspect_ratios=((0.5, 1.0, 2.0),))
    (kinds,) = anchors.num_anchors_per_location()
    return RegionProposalNetwork(
        anchors,
        return_float32_(RPNHead(width, kinds)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000},
        post_nms_top_n={"training": 2000, "testing": proposals},
        nms_thresh=0.7,
    )


def build_roi_heads(head: RoIHead, classes: int, config: DetectorConfig) -> C4RoIHeads:
    """Build the heads that classify proposals (`classes` and background) and predict masks."""
    mask_predictor = None
    if config.masks:
        mask_predictor = return_float32_(MaskRCNNPredictor(head.width, MASK_WIDTH, classes + 1))
    return C4RoIHeads(
        box_head=head,
        box_predictor=return_float32_(FastRCNNPredictor(head.width, classes + 1)),
        mask_predictor=mask_predictor,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.rois,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )


class Detector(Method):
    """Detector; reads `images`, a list of tensors, and `targets`, a list of torchvision's dicts."""

    file = "detector.safetensors"

    def __init__(self, config: DetectorConfig, setup: Setup) -> None:
        super().__init__()
        if config.path:
            encoder, metadata, _ = load_encoder(config.path)
            if get_stem(metadata) != "imagenet":
                raise UserError(f"{config.path}: has the small stem; detection needs torchvision's")
        else:
            encoder, _ = build_encoder(setup.encoder)
        if is_timm_encoder(encoder):
            raise UserError(
                f"{config.path or setup.encoder}: is a network of timm; the C4 detector is built "
                "from the stages of torchvision's ResNets"
            )
        body, head = return_float32_(Body(encoder)), RoIHead(encoder.get_submodule("layer4"))
        self.network = GeneralizedRCNN(
            body,
            build_rpn(body.out_channels, config.proposals),
            build_roi_heads(head, setup.classes, config),
            Transform(config.short_sides, config.long_side, list(MEAN), list(STD)),
        )
        self.sides = config.short_sides, config.test_side

    def train(self, mode: bool = True) -> "Detector":
        """Set the mode; the short side is drawn for each image in training and fixed in tests."""
        super().train(mode)
        self.network.transform.min_size = self.sides[0] if mode else (self.sides[1],)
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = self.network(batch.images, batch.targets)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.inference_mode()
    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detect objects in images (3, H, W) float32 in 0 .. 1.

        Returns, for each image, boxes, labels (from 1), scores and, for Mask R-CNN, masks.
        """
        return self.network(images)

    def exported(self) -> nn.Module:
        return self.network

    def sheet(self, batch: Any, recipe: Any) -> None:
        return None
