"""A linear classifier on a frozen encoder, trained by the same trainer."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from train.encoders import load_encoder
from train.methods.method import Method, MethodConfig, Setup

INITIAL_STD = 0.01
"""Standard deviation of the classifier's initial weights (main_lincls.py of MoCo and of the masked
variant)."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(MethodConfig):
    """The encoder to probe."""

    name: ClassVar[str] = "linear"
    free: ClassVar[frozenset[str]] = frozenset({"path"})
    depends_on_micro_batches: ClassVar[bool] = False

    path: str
    """File of the encoder, or folder of its run."""
    sha256: str
    """sha256 of that file; resuming requires the same file."""
    test_digest: str | None = None
    """Digest of the test images, because the log of a probe holds their accuracies; None: not
    known, as in the checkpoints of an older version."""

    def build(self, setup: Setup) -> "LinearProbe":
        return LinearProbe(self, setup)


class LinearProbe(Method):
    """Linear probe; reads `query` and `label` of a batch. The encoder and its statistics are
    frozen."""

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
        """Classify (N, 3, H, W) -> (N, classes) float32, from features that are not normalized."""
        with torch.no_grad():
            features = self.encoder(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.float())

    def exported(self) -> nn.Module:
        return self.classifier
