"""SimCLR with hard negatives.

    x_q   masked query view --> encoder + head --> q       gradient
    x_k   plain key view -----> encoder + head --> k       gradient
    x_k-  the key view with most of its foreground masked -> k-   gradient unless switched off

NT-Xent over the 2 M unit embeddings of all ranks (google-research/simclr, objective.py; ADIOS's
losses/simclr.py): for anchor i with its positive p(i)

    l_i = - log exp(z_i.z_p / tau) / D_i
    D_i = sum_{j != i} exp(z_i.z_j / tau) + sum_h exp(rho z_i.k-_h / tau)

and the loss is the mean over all anchors; with `sum_directions` it is the mean over the queries
plus that over the keys, twice as much, as in google-research/simclr.

The last sum, over the hard negatives of the anchor's own image, is derived from the MoCo form on
the poster: neither code nor readable text was published for SimCLR. The open choices are fields of
`SimCLRConfig` with our own defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline import Recipe
from train.distributed import gather_with_gradient, rank, world_size
from train.encoders import build_encoder
from train.methods.method import (
    Method,
    MethodConfig,
    Setup,
    build_projector,
    note_hard_negative_weight,
    require_keys,
    warn_of_collapse,
)


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodConfig):
    """Options: tau and the head as in SimCLR, the use of hard negatives ours."""

    name: ClassVar[str] = "simclr"

    temperature: float = 0.2
    """tau: similarities are divided by it (0.2 on ImageNet-100 in solo-learn and ADIOS)."""
    projection: int = 128
    """Width of the projected embedding."""
    hidden: int | None = None
    """Width of the head's hidden layers; by default that of the encoder's features."""
    head_layers: int = 2
    """Number of linear layers of the head (2 in solo-learn and ADIOS, 3 in
    google-research/simclr)."""
    head_norm: bool = False
    """Put batch normalization after each layer of the head (google-research/simclr: yes)."""
    sum_directions: bool = False
    """Sum the losses of queries and keys (google-research/simclr) instead of averaging them (the
    paper, solo-learn, ADIOS). Under LARS a sum doubles the updates of norms and biases only."""
    joint_views: bool = False
    """Send query and key through the network as one batch with common batch statistics
    (google-research/simclr); by default masked and unmasked views have separate statistics."""
    rho: float = 2.0
    """Factor on the similarity of a hard negative (MoCo's value; unverified for SimCLR)."""
    hard_for_keys: bool = False
    """Compare the key with the hard negatives of its image too (our default: only the query)."""
    hard_gradient: bool = True
    """Let gradients flow through the hard negatives (our default: no branch is a teacher)."""
    hard_of_others: bool = False
    """Use the hard negatives of the rank's other images as negatives too (our default: no)."""

    def check(self, recipe: Recipe) -> None:
        require_keys(self, recipe)

    def notes(self, recipe: Recipe, batch_size: int) -> list[str]:
        negatives = 2 * batch_size - 2  # both views of the other images
        where = "the other views"
        return note_hard_negative_weight(self.rho, self.temperature, negatives, where, recipe)

    def build(self, setup: Setup) -> "SimCLR":
        return SimCLR(self, setup)


def nt_xent(
    embeddings: Tensor,
    hard: Tensor,
    first: int,
    *,
    rho: float,
    temperature: float,
    hard_for_keys: bool = False,
    hard_of_others: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean loss of this rank's anchors.

    Args:
        embeddings: unit queries of all ranks and unit keys of all ranks, (2, M, D).
        hard: unit hard negatives of this rank's images, (N, H, D); H may be 0.
        first: this rank's images are rows `first` .. `first` + N - 1 of the M.

    Returns:
        The loss, and scalars: `contrastive_accuracy`, the share of anchors whose positive is the
        most similar of all; `negatives_accuracy`, the same without hard negatives; and the mean
        similarities of positives, of views of other images and, if there are any, of the queries'
        own hard negatives.
    """
    views, images, width = embeddings.shape
    size = len(hard)
    own = torch.arange(first, first + size, device=embeddings.device)
    anchors = embeddings[:, first : first + size].reshape(views * size, width)  # (2N, D)
    logits = anchors @ embeddings.reshape(views * images, width).T  # (2N, 2M)
    itself = torch.cat([own, images + own])
    positive = torch.cat([images + own, own])
    logits = logits.scatter(1, itself[:, None], float("-inf"))

    similarity = torch.einsum("vnd,mhd->vnmh", anchors.view(views, size, width), hard)
    if not hard_of_others:  # keep those of the anchor's own image: (2, N, H)
        similarity = similarity.diagonal(dim1=1, dim2=2).permute(0, 2, 1)
    hard_logits = rho * similarity.flatten(2)
    if not hard_for_keys:
        hard_logits = torch.stack([hard_logits[0], torch.full_like(hard_logits[1], -torch.inf)])
    with torch.no_grad():
        scalars = compute_similarity_scalars(embeddings, anchors, logits, positive, hard)
    logits = torch.cat([logits, hard_logits.flatten(0, 1)], dim=1) / temperature
    accuracy = (logits.detach().argmax(dim=1) == positive).float().mean()
    loss = nn.functional.cross_entropy(logits, positive)
    return loss, {"contrastive_accuracy": accuracy, **scalars}


def compute_similarity_scalars(
    embeddings: Tensor, anchors: Tensor, logits: Tensor, positive: Tensor, hard: Tensor
) -> dict[str, Tensor]:
    """Compute the scalars of `nt_xent` that describe similarities before hard negatives are added.

    Args:
        anchors: (2N, D) embeddings of this rank.
        logits: (2N, 2M) similarities, -inf between an anchor and itself.
        positive: (2N,) column of each anchor's positive.
    """
    own = logits.gather(1, positive[:, None])[:, 0]
    views = embeddings.flatten(0, 1)
    # without the anchor itself
    negative_sums = anchors @ views.sum(dim=0) - anchors.square().sum(dim=1) - own
    scalars = {
        "negatives_accuracy": (logits.argmax(dim=1) == positive).float().mean(),
        "key_similarity": own.mean(),
        "negatives_similarity": negative_sums.mean() / max(1, len(views) - 2),
    }
    if hard.shape[1]:
        queries = anchors[: len(hard)]
        scalars["hard_similarity"] = torch.einsum("nd,nhd->nh", queries, hard).mean()
    return scalars


class SimCLR(Method):
    """SimCLR with hard negatives; reads `query`, `key` and `hard_negative`, needs no label."""

    def __init__(self, config: SimCLRConfig, setup: Setup) -> None:
        super().__init__()
        self.config, self.setup = config, setup
        self.encoder, width = build_encoder(setup.encoder, setup.stem)
        self.head = build_projector(
            width,
            config.hidden,
            config.projection,
            layers=config.head_layers,
            norm=config.head_norm,
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        size, config = len(batch.query), self.config
        q, k = self.project_pair(batch.query, batch.key)  # (N, D) each
        with torch.set_grad_enabled(config.hard_gradient and torch.is_grad_enabled()):
            hard = self.project_hard_negatives(batch.hard_negative, k)  # (N, H, D)
        with torch.autocast(q.device.type, enabled=False):  # a softmax over 2M needs float32
            embeddings = torch.stack([gather_with_gradient(q), gather_with_gradient(k)])
            loss, scalars = nt_xent(
                embeddings,
                hard,
                rank() * size,
                rho=config.rho,
                temperature=config.temperature,
                hard_for_keys=config.hard_for_keys,
                hard_of_others=config.hard_of_others,
            )
        loss = 2 * loss if config.sum_directions else loss
        return {"loss": loss, **scalars}

    def contrast(self, batch: Any) -> dict[str, Tensor]:
        """Compute `forward`; SimCLR remembers nothing between steps."""
        return self(batch)

    def exported(self) -> nn.Module:
        return self.encoder

    def warnings(self, scalars: Mapping[str, float]) -> list[str]:
        return warn_of_collapse(scalars["negatives_similarity"])

    def notes(self, samples: int) -> list[str]:
        notes = []
        if world_size() > 1 and not self.setup.sync_bn:
            notes.append(
                "each process has its own batch statistics; SimCLR computes them over all "
                "processes: --sync-bn"
            )
        if self.setup.grad_accum_steps > 1:
            part = self.setup.batch_size // self.setup.grad_accum_steps
            notes.append(f"negatives come from the same part of a step: {part} images")
        return notes

    def project(self, images: Tensor) -> Tensor:
        """Embed images (N, 3, H, W) as float32 unit vectors (N, D)."""
        return normalize(self.head(self.encoder(images)).float(), dim=1)

    def project_pair(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Embed queries and keys, in one batch or in two."""
        if not self.config.joint_views:
            return self.project(query), self.project(key)
        embedded = self.project(torch.cat([query, key]))
        return embedded[: len(query)], embedded[len(query) :]

    def project_hard_negatives(self, images: Tensor | None, key: Tensor) -> Tensor:
        """Embed hard negatives (H * N, 3, h, w), the first view of all samples first: (N, H, D)."""
        if images is None:
            return key.new_empty(len(key), 0, key.shape[1])
        return torch.stack([self.project(view) for view in images.split(len(key))], dim=1)
