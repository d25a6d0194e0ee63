"""MaskCo: contrastive mask prediction (Zhao et al., ICCV 2021).

    x_q  query view, its regions masked --> encoder --> mask prediction head --> RoIAlign --> head
    x_k  key view, unmasked --> momentum encoder ----------------------------> RoIAlign --> head

The feature q_R of a masked region is pulled to the key feature k_R of the same part of the image,
and pushed away from regions of other images (a queue) and, optionally, from the other regions of
the same image:

    loss = - log exp(q_R.k_R / tau) / ( exp(q_R.k_R / tau) + sum_n exp(q_R.n / tau) )

No code was released, and only the abstract and a figure caption of the paper were available to us.
They give the order of the modules, one masked and one unmasked view, the positive, and that most
negatives come from other images. Everything else is our interpretation: the prediction head on the
path of the query only, a momentum encoder and a queue as in MoCo v2, boxes as regions, and every
number. Choosing regions by stored saliency (`--recipe.region-choice salient`) is ours.

A region that is not valid (the overlap of the views is too small) is left out of the loss, and its
key out of the queue. The loss is the mean over the valid regions of all ranks. With
`--grad-accum-steps` it is the mean of the losses of the micro-batches, which weigh the same, so a
region of a micro-batch with fewer regions weighs more.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchvision.ops import roi_align

from pipeline import Recipe
from schemas import UserError
from train.distributed import all_mean_, world_size
from train.encoders import compute_feature_map
from train.methods.method import OptimizationGroup, Setup, require_keys
from train.methods.momentum import MomentumConfig, MomentumMethod
from train.timm_encoders import has_parameters_after_map, is_timm_encoder

ADVICE = "take --recipe maskco"


@dataclass(frozen=True, kw_only=True)
class MaskCoConfig(MomentumConfig):
    """Options with numbers of MoCo v2 or our own; those of the paper were not available to us.

    The keys in the queue are features of regions.
    """

    name: ClassVar[str] = "maskco"

    prediction_head: bool = True
    """Use the mask prediction head, between masked and unmasked features; off for an ablation."""
    prediction_depth: int = 2
    """Number of 3 x 3 convolutions of the mask prediction head, in one residual block (our
    choice)."""
    region_size: int = 3
    """Side of the grid into which RoIAlign divides a region before averaging (our choice)."""
    other_regions: bool = False
    """Use the other regions of the same image as negatives too (the paper: "a few may")."""

    def check(self, recipe: Recipe) -> None:
        require_keys(self, recipe)
        if recipe.query_mask != "regions" or recipe.fill == "none":
            raise UserError(f"method maskco: the recipe masks no regions; {ADVICE}")
        if recipe.hard_negatives:
            raise UserError(f"method maskco: has no use for hard negatives; {ADVICE}")

    def build(self, setup: Setup) -> "MaskCo":
        return MaskCo(self, setup)


class PredictionHead(nn.Module):
    """A residual block of 3 x 3 convolutions; predicts features behind a mask from around it."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers[:-1])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.layers(x))


class MaskCo(MomentumMethod):
    """MaskCo; reads `query`, `key`, their regions and `region_valid` (`--recipe maskco`)."""

    def __init__(self, config: MaskCoConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.config, self.setup = config, setup
        if is_timm_encoder(self.encoder) and self.encoder.num_features != self.width:
            raise UserError(
                f"method maskco: {setup.encoder} has {self.encoder.num_features} channels in its "
                f"last map but {self.width} after pooling; choose one with equal numbers"
            )
        self.prediction = (
            PredictionHead(self.width, config.prediction_depth)
            if config.prediction_head
            else nn.Identity()
        )
        self.has_unused = is_timm_encoder(self.encoder) and has_parameters_after_map(self.encoder)

    def optimization_groups(self) -> list[OptimizationGroup]:
        return [OptimizationGroup(self, has_unused=self.has_unused)]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        if batch.query_regions is None:
            raise UserError(f"method maskco: the batch has no regions; {ADVICE}")
        valid = batch.region_valid.flatten()  # (N * R,)
        maps = self.prediction(compute_feature_map(self.encoder, batch.query))
        q = self.project_regions(maps, batch.query_regions, batch.query, self.head)
        with torch.no_grad():
            maps = compute_feature_map(self.momentum_encoder, batch.key)
            k = self.project_regions(maps, batch.key_regions, batch.key, self.momentum_head)
        self.remember(k, valid)
        with torch.autocast(q.device.type, enabled=False):
            logits = self.compute_logits(q, k, batch.region_valid)
            losses = cross_entropy(
                logits, torch.zeros(len(q), dtype=torch.long, device=q.device), reduction="none"
            )
            weight = valid.float()
            # averaged over the ranks, so that a region weighs the same on every rank
            count = all_mean_(weight.sum()).clamp(min=1 / world_size())
            loss = (losses * weight).sum() / count
        hits = (logits.detach().argmax(dim=1) == 0).float()
        return {
            "loss": loss,
            "contrastive_accuracy": (hits * weight).sum() / count,
            "regions_valid": weight.mean(),
        }

    def notes(self, samples: int) -> list[str]:
        if self.setup.grad_accum_steps == 1:
            return []
        return [
            f"the {self.setup.grad_accum_steps} micro-batches of a step weigh the same: a region "
            "weighs more in a micro-batch with fewer regions"
        ]

    def project_regions(
        self, maps: Tensor, boxes: Tensor, images: Tensor, head: nn.Module
    ) -> Tensor:
        """Pool and project regions: maps (N, D, h, w), boxes (N, R, 4) -> unit (N * R, P)."""
        size, count = boxes.shape[:2]
        number = torch.arange(size, device=boxes.device).repeat_interleave(count)
        rois = torch.cat([number[:, None].float(), boxes.flatten(0, 1)], dim=1)
        scale = maps.shape[-1] / images.shape[-1]
        with torch.autocast(maps.device.type, enabled=False):
            side = self.config.region_size
            pooled = roi_align(maps.float(), rois, side, spatial_scale=scale, aligned=True)
            pooled = pooled.mean(dim=(2, 3))
        return normalize(head(pooled).float(), dim=1)

    def compute_logits(self, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        """Compute logits (N * R, 1 + K [+ R]): positive, queue, optionally the other regions."""
        positive = torch.einsum("rd,rd->r", q, k)[:, None]
        parts = [positive, q @ self.queue.T]
        if self.config.other_regions:
            size, count = valid.shape
            own = torch.einsum("nrd,nsd->nrs", q.view(size, count, -1), k.view(size, count, -1))
            itself = torch.eye(count, dtype=torch.bool, device=q.device)
            excluded = itself | ~valid[:, None, :]
            parts.append(own.masked_fill(excluded, -torch.inf).flatten(0, 1))
        return torch.cat(parts, dim=1) / self.config.temperature
