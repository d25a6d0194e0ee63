"""Supervised training with the same encoder and loader.

It reads only the queries: `--preset supervised` makes one unmasked view of each image.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from schemas import UserError
from train.encoders import build_encoder
from train.methods.method import Method, MethodConfig, Setup


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MethodConfig):
    """Cross-entropy on the labels of the shards."""

    name: ClassVar[str] = "supervised"
    depends_on_micro_batches: ClassVar[bool] = False

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, 0 to 1."""

    def build(self, setup: Setup) -> "Supervised":
        return Supervised(self, setup)


class Supervised(Method):
    """Supervised classifier; reads `query` and `label` of a batch."""

    def __init__(self, config: SupervisedConfig, setup: Setup) -> None:
        super().__init__()
        if setup.classes < 2:
            raise UserError(
                f"method supervised: the shards have {setup.classes} classes; it needs labels of "
                "at least 2 (DATASET=folder takes the names of the subfolders)"
            )
        if unlabeled := setup.unlabeled:
            raise UserError(
                f"method supervised: {unlabeled} images of the shards have no label; make "
                "shards of labeled images only, or take a method that reads no labels"
            )
        self.config = config
        self.encoder, width = build_encoder(setup.encoder, setup.stem)
        self.classifier = nn.Linear(width, setup.classes)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        logits = self.classifier(self.encoder(batch.query))
        with torch.autocast(logits.device.type, enabled=False):
            loss = cross_entropy(
                logits.float(), batch.label, label_smoothing=self.config.label_smoothing
            )
        accuracy = (logits.detach().argmax(dim=1) == batch.label).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def exported(self) -> nn.Module:
        return self.encoder
