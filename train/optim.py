"""Optimizers and learning rate schedules."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from torch import nn
from torch.optim import SGD, Optimizer

BASE_BATCH = 256
"""Batch size of `base_lr`; rates scale linearly with the batch (Goyal et al. 2017)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate and its schedule."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """lars: SGD with an adaptive rate per layer, for large batches (timm's implementation)."""
    base_lr: float = 0.03
    """Peak learning rate for a batch of 256 images; scaled linearly to other batches."""
    lr: float | None = None
    """Peak learning rate, unscaled; overrides `base_lr`."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    """Weight decay. sgd: on all parameters, as in MoCo; lars: not on norms and biases, as in
    SimCLR."""
    decay_norms: bool = True
    """sgd: apply weight decay to normalization layers too (MoCo: yes; detectron2: no)."""
    trust_coefficient: Annotated[float, tyro.conf.arg(aliases=("--trust",))] = 0.02
    """lars: factor t in the trust ratio of a layer, t x |weights| / (|gradient| + weight_decay x
    |weights|), by which its rate is multiplied (the default is eta of solo-learn and ADIOS)."""
    trust_clip: bool = True
    """lars: use the trust ratio itself as the rate of a layer, at most lr (as solo-learn and ADIOS
    do), instead of lr times the ratio."""
    clip_gradient: float | None = None
    """Maximum global gradient norm; longer gradients are scaled down to it."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """cosine: half a cosine down to 0. steps: divide the learning rate by 10 at each of
    `milestones`."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises linearly from 0."""
    milestones: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--drop-epochs",))] = (60, 80)
    """steps: epochs, counted from 0, at which the learning rate is divided by 10."""

    def peak(self, batch_size: int) -> float:
        """Return the peak learning rate for this global batch."""
        return self.base_lr * batch_size / BASE_BATCH if self.lr is None else self.lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer over all trainable parameters; the rate is set before each step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        norms = set() if config.decay_norms else find_norm_parameters(model)
        undecayed = [p for p in trainable if p in norms]
        groups: list[dict[str, Any]] = [{"params": [p for p in trainable if p not in norms]}]
        return SGD(
            groups + [{"params": undecayed, "weight_decay": 0.0}] * bool(undecayed),
            lr=0.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
    from timm.optim import Lars  # slow to import

    # without weight decay timm's LARS updates norms and biases as SGD does
    weights = [p for p in trainable if p.ndim > 1]
    norms_and_biases = [p for p in trainable if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": norms_and_biases, "weight_decay": 0.0},
    ]
    return Lars(
        groups,
        lr=0.0,
        momentum=config.momentum,
        trust_coeff=config.trust_coefficient,
        trust_clip=config.trust_clip,
    )


def find_norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights and biases of all normalization layers."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return {p for layer in model.modules() if isinstance(layer, kinds) for p in layer.parameters()}


def compute_learning_rate(
    config: OptimConfig, step: int, *, peak: float, total: int, epoch: int
) -> float:
    """Compute the learning rate of one step: linear warm-up, then `config.schedule`.

    It changes with each step. The code of MoCo and of the masked variant changes it once per epoch
    and has no warm-up.

    Args:
        step: number of finished steps, 0 <= step < total.
        peak: the highest rate; a warm-up starts at peak / (its number of steps).
        total: number of steps of the whole run.
        epoch: number of steps of an epoch.
    """
    warmup = config.warmup_epochs * epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "steps":
        return peak * 0.1 ** count_reached(config.milestones, step // epoch)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def count_reached(milestones: Sequence[int], epoch: int) -> int:
    """Count the milestones that lie at or before this epoch."""
    return bisect_right(sorted(milestones), epoch)
