"""A linear classifier on a frozen encoder, trained by the same loop."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.encoders import load_encoder
from train.methods.method import Method, MethodConfig, Setup

INITIAL_STD = 0.01  # of the classifier's weights (main_lincls.py of MoCo and of the masked variant)


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(MethodConfig):
    """Which encoder is probed."""

    name: ClassVar[str] = "linear"

    path: str
    """The encoder's file, or the folder of its run."""
    sha256: str
    """Of the file: a probe goes on with no other."""

    def build(self, setup: Setup) -> "LinearProbe":
        return LinearProbe(self, setup)


class LinearProbe(Method):
    """Reads `query` and `label` of a batch. The encoder stays as it is, its statistics too."""

    file = "classifier.safetensors"

    def __init__(self, config: LinearProbeConfig, setup: Setup) -> None:
        super().__init__()
        encoder, _, _ = load_encoder(config.path)
        self.encoder = encoder.requires_grad_(False).eval()
        width = self.encoder(torch.zeros(1, 3, 64, 64)).shape[1]
        self.classifier = nn.Linear(width, setup.classes)
        nn.init.normal_(self.classifier.weight, std=INITIAL_STD)
        nn.init.zeros_(self.classifier.bias)
        self.train()

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, batch: Any) -> dict[str, Tensor]:
        logits = self.logits(batch.query)
        loss = cross_entropy(logits, batch.label)
        accuracy = (logits.detach().argmax(dim=1) == batch.label).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes) float32, of features that are not normalised."""
        with torch.no_grad():
            features = self.encoder(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())

    def exported(self) -> nn.Module:
        return self.classifier
