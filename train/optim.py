"""Optimisers and learning rates."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer

BASE_BATCH = 256
"""The batch that `base_lr` is for; a rate grows in proportion to the batch (Goyal et al. 2017)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move."""

    optimizer: Literal["sgd", "lars"] = "sgd"
    """lars: SGD with a rate of its own for each layer, for large batches (timm's)."""
    base_lr: float = 0.03
    """Highest learning rate at a batch of 256 images; in proportion at others."""
    lr: float | None = None
    """Highest learning rate as it is, in place of `base_lr`."""
    momentum: float = 0.9
    """Of the gradients."""
    weight_decay: float = 1e-4
    """sgd: on all parameters, as MoCo has it; lars: not on norms and biases, as SimCLR has it."""
    decay_norms: bool = True
    """sgd: whether weight decay is on the weights of norms too (MoCo: yes; detectron2: no)."""
    trust: float = 0.02
    """lars: a layer's rate is lr x trust x |weights| / |gradient| (eta of solo-learn and ADIOS)."""
    trust_clip: bool = True
    """lars: whether it is at most lr itself (as these two have it)."""
    clip_gradient: float | None = None
    """Longest gradient of all parameters together (Euclidean); longer ones are shortened to it."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """cosine: half a cosine down to 0. steps: a tenth from each of `drop_epochs` on."""
    warmup_epochs: int = 0
    """Epochs in which the rate rises linearly from 0."""
    drop_epochs: tuple[int, ...] = (60, 80)
    """steps: epochs, counted from 0, at which the rate drops."""

    def peak(self, batch_size: int) -> float:
        """The highest rate at this global batch."""
        return self.base_lr * batch_size / BASE_BATCH if self.lr is None else self.lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimiser over all trainable parameters; the rate is set before each step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        norms = set() if config.decay_norms else norm_parameters(model)
        plain = [p for p in trainable if p in norms]
        groups: list[dict[str, Any]] = [{"params": [p for p in trainable if p not in norms]}]
        return SGD(
            groups + [{"params": plain, "weight_decay": 0.0}] * bool(plain),
            lr=0.0,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
    from timm.optim import Lars  # here: timm is slow to import

    # without weight decay timm's LARS moves them as SGD would
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
        trust_coeff=config.trust,
        trust_clip=config.trust_clip,
    )


def norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The weights and biases of all normalisation layers."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return {p for layer in model.modules() if isinstance(layer, kinds) for p in layer.parameters()}


def learning_rate(config: OptimConfig, step: int, *, peak: float, total: int, epoch: int) -> float:
    """The rate of one step: linear while it warms up, then by `config.schedule`.

    Per step. MoCo's code, and the masked variant's, move it once an epoch and have no warm-up.

    Args:
        step: steps already finished, 0 <= step < total.
        peak: the highest rate; the first one of a warm-up is peak / its steps.
        total: steps of the whole training.
        epoch: steps of an epoch.
    """
    warmup = config.warmup_epochs * epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "steps":
        return peak * 0.1 ** drops(config.drop_epochs, step // epoch)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def drops(epochs: Sequence[int], epoch: int) -> int:
    """How many of these epochs have begun."""
    return bisect_right(sorted(epochs), epoch)
