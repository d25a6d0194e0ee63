"""Optimiser and learning rate."""

import math

from torch import nn
from torch.optim import SGD

# MoCo's rule: 0.03 for a global batch of 256 (facebookresearch/moco), linear in the batch; the
# released code of the masked variant has 0.015 at 128, which is the same line.
LR_PER_BATCH = 0.03 / 256


def build_sgd(model: nn.Module, momentum: float, weight_decay: float) -> SGD:
    """SGD over all trainable parameters, weight decay on norms and biases too, as MoCo has it.

    The rate is set before each step, by `learning_rate`.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return SGD(trainable, lr=0.0, momentum=momentum, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, *, peak: float, total: int, warmup: int = 0) -> float:
    """The rate of one step: linear over `warmup` steps, then half a cosine from `peak` to 0.

    Per step. MoCo's code, and the masked variant's, move it once an epoch and have no warm-up.

    Args:
        step: steps already finished, 0 <= step < total.
        peak: the highest rate.
        total: steps of the whole training.
        warmup: steps of the linear part; its first rate is peak / warmup.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
