"""MoCo v2 with hard negatives.

    x_q   masked query view --> encoder + head ------------> q       gradient
    x_k   plain key view -----> momentum encoder + head ---> k+      no gradient, enters the queue
    x_k-  the key view with most of its foreground masked -> k-      no gradient, is never queued

    logits = [ q.k+ , q.n_1 .. q.n_K , rho q.k-_1 .. rho q.k-_H ] / tau     loss = CE(logits, 0)

The loss is that of the released code of saliency-guided masking for ConvNets (WACV 2024; its
builder.py): the denominator includes the positive, and rho scales the similarity of a hard
negative. The form of that logit is from Ge et al., NeurIPS 2021 (arXiv 2110.14189).

Two things differ from that code, which indexes the batch axis: it sends one image of each batch
through batch normalization alone and compares all queries with it. Here each query is compared with
the hard negatives of its own image, as on the poster, and the momentum encoder never normalizes
over a single image. `shared_hard_negative` restores the behavior of that code (D2 and D3 in
docs/method.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from pipeline import Recipe
from schemas import UserError
from train.distributed import shuffle_across_ranks, world_size
from train.methods.method import (
    Setup,
    note_hard_negative_weight,
    require_keys,
    warn_of_collapse,
)
from train.methods.momentum import MomentumConfig, MomentumMethod, share_casts

STRIDE = 32
"""Stride of a ResNet's last map in pixels of the crop."""


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MomentumConfig):
    """Options with the numbers of MoCo v2 and, for rho, of the masked variant's README."""

    name: ClassVar[str] = "moco"
    depends_on_micro_batches: ClassVar[bool] = False

    rho: float = 2.0
    """Factor on the similarity of a hard negative; 1 treats it as any other negative."""
    shared_hard_negative: bool = False
    """Do as the released code: compare all queries of a rank with the hard negative of its first
    image (the n-th hard negative is that of the n-th image), which is normalized by itself."""

    def check(self, recipe: Recipe) -> None:
        require_keys(self, recipe)

    def notes(self, recipe: Recipe, batch_size: int) -> list[str]:
        where = "the queue"
        return note_hard_negative_weight(self.rho, self.temperature, self.queue, where, recipe)

    def build(self, setup: Setup) -> "MoCo":
        if self.shared_hard_negative and setup.crop_size <= STRIDE and setup.stem == "imagenet":
            raise UserError(
                f"--shared-hard-negative: normalizes one image alone, and at --crop-size "
                f"{setup.crop_size} its last map is one cell; take a larger crop"
            )
        return MoCo(self, setup)


def contrastive_logits(
    q: Tensor, key: Tensor, queue: Tensor, hard: Tensor, *, rho: float, temperature: float
) -> Tensor:
    """Compute the logits of every query; the positive is column 0.

    Args:
        q: unit queries, (N, D).
        key: unit keys, (N, D); row i belongs to the image of query i.
        queue: unit keys of earlier batches, (K, D).
        hard: unit hard negatives, (N, H, D); row i belongs to the image of query i. H may be 0.

    Returns:
        (N, 1 + K + H): positive, queue, hard negatives.
    """
    positive = torch.einsum("nd,nd->n", q, key)[:, None]  # (N, 1)
    negatives = q @ queue.T  # (N, K)
    hard_negatives = rho * torch.einsum("nd,nhd->nh", q, hard)  # (N, H)
    return torch.cat([positive, negatives, hard_negatives], dim=1) / temperature


def contrast_scalars(logits: Tensor, negatives: int) -> dict[str, Tensor]:
    """Compute the share of queries whose positive is the most similar.

    Args:
        logits: (N, 1 + negatives + H): positive, negatives, hard negatives.

    Returns:
        Two scalars: `contrastive_accuracy` among all, `negatives_accuracy` without hard negatives.
    """
    positive, hard = logits[:, 0], logits[:, 1 + negatives :]
    wins = positive >= logits[:, 1 : 1 + negatives].amax(dim=1)
    wins_among_all = wins & (positive[:, None] >= hard).all(dim=1)
    return {
        "contrastive_accuracy": wins_among_all.float().mean(),
        "negatives_accuracy": wins.float().mean(),
    }


def compute_batch_similarity(q: Tensor) -> Tensor:
    """Compute the mean similarity of the unit queries (N, D) of different images; 0 if N is 1.

    It shows a collapse that similarities to the queue do not show: if all images have the same
    embedding, which moves with the weights, new keys still differ from the older ones in the queue.
    """
    pairs = len(q) * (len(q) - 1)
    return (q.sum(dim=0).square().sum() - q.square().sum()) / max(1, pairs)


class MoCo(MomentumMethod):
    """MoCo v2 with hard negatives; reads `query`, `key` and `hard_negative`, needs no label."""

    def __init__(self, config: MoCoConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.config = config
        self.shuffles = not setup.sync_bn  # either keeps batch statistics from revealing pairs

    def forward(self, batch: Any) -> dict[str, Tensor]:
        scalars, key = self.compute_loss(batch)
        self.remember(key)
        return scalars

    def contrast(self, batch: Any) -> dict[str, Tensor]:
        """Compute `forward` without adding the keys to the queue."""
        return self.compute_loss(batch)[0]

    def compute_loss(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the loss and other scalars; return them and the keys (N, D)."""
        q = self.project(self.encoder, self.head, batch.query)  # (N, D)
        with share_casts(self.momentum_encoder, self.momentum_head):
            key = self.momentum_project(batch.key)  # (N, D)
            hard = self.project_hard_negatives(batch.hard_negative, key)  # (N, H, D)

        # a softmax over K+1+H, and means over the queue, need float32
        with torch.autocast(q.device.type, enabled=False):
            logits = contrastive_logits(
                q,
                key,
                self.queue,
                hard,
                rho=self.config.rho,
                temperature=self.config.temperature,
            )
            target = torch.zeros(len(q), dtype=torch.long, device=q.device)
            loss = cross_entropy(logits, target)
            scalars = contrast_scalars(logits.detach(), len(self.queue))
            with torch.no_grad():
                scalars["key_similarity"] = (q * key).sum(dim=1).mean()
                scalars["batch_similarity"] = compute_batch_similarity(q)
                scalars["negatives_similarity"] = q.mean(dim=0) @ self.queue.mean(dim=0)
                if hard.shape[1]:
                    scalars["hard_similarity"] = torch.einsum("nd,nhd->nh", q, hard).mean()
        return {"loss": loss, **scalars}, key

    def warnings(self, scalars: Mapping[str, float]) -> list[str]:
        return warn_of_collapse(scalars["batch_similarity"])

    def notes(self, samples: int) -> list[str]:
        notes = []
        if world_size() == 1 and self.shuffles:
            notes.append("one process: shuffling batch normalization has nothing to shuffle")
        if world_size() > 1 and not self.shuffles and self.config.shared_hard_negative:
            notes.append(
                "--sync-bn normalizes the shared hard negatives of all processes together, where "
                "the released code, which has no --sync-bn, normalizes each alone"
            )
        if self.config.queue > samples:
            notes.append(
                f"the queue of {self.config.queue} keys is longer than the {samples} images: the "
                "negatives of every query include older keys of its own image"
            )
        return notes

    @staticmethod
    def project(encoder: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) as float32 unit vectors (N, D)."""
        return normalize(head(encoder(images)).float(), dim=1)

    def momentum_project(self, images: Tensor) -> Tensor:
        """Embed images with the momentum branch, shuffled across the ranks.

        With SyncBN they are not shuffled: batch statistics are those of all images anyway.
        """
        if not self.shuffles:
            return self.project(self.momentum_encoder, self.momentum_head, images)
        images, restore = shuffle_across_ranks(images, self.generator)
        return restore(self.project(self.momentum_encoder, self.momentum_head, images))

    def project_hard_negatives(self, images: Tensor | None, key: Tensor) -> Tensor:
        """Embed hard negatives (H * N, 3, h, w), the first view of all N samples first: (N, H, D).

        Each view has its own forward pass, so it is normalized over a batch of one kind of image,
        as the key is.
        """
        if images is None:
            return key.new_empty(len(key), 0, key.shape[1])
        views = images.split(len(key))
        if self.config.shared_hard_negative:  # the released code indexes the batch: n-th image
            if len(views) > len(key):
                raise UserError(
                    f"--shared-hard-negative: {len(views)} hard negatives need as many images, but "
                    f"a part of a step has {len(key)}"
                )
            alone = [self.momentum_project(view[n : n + 1]) for n, view in enumerate(views)]
            return torch.stack(alone, dim=1).expand(len(key), -1, -1)
        return torch.stack([self.momentum_project(view) for view in views], dim=1)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
