"""Batch normalisation over the images of all ranks (SyncBN), on GPUs and on CPUs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distributed import SumWithGradient, world_size


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with each batch normalisation over all ranks; state_dict keys stay.

    On a GPU it is torch's SyncBatchNorm, which refuses other devices; on a CPU ours.
    """
    if device.type == "cuda":
        if any(is_norm_with_activation(layer) for layer in module.modules()):
            from timm.layers import convert_sync_batchnorm  # torch's own loses the activation

            return convert_sync_batchnorm(module)
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm.of(child))
    return module


def is_norm_with_activation(layer: nn.Module) -> bool:
    """Whether it is timm's batch normalization with dropout and activation in the same layer."""
    return isinstance(layer, _BatchNorm) and hasattr(layer, "act") and hasattr(layer, "drop")


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation over all ranks' images, with gradients back to all of them.

    Ranks may have different numbers of values: detectors do. Two reductions a layer, the mean
    before the squares, so that nothing is lost to cancellation.
    """

    then: tuple[nn.Module, ...] = ()
    """What timm's layers apply to the normalized values; without weights, so no keys of its own."""

    @classmethod
    def of(cls, norm: _BatchNorm) -> "GlobalBatchNorm":
        """The same parameters and buffers, not copies of them."""
        new = cls(norm.num_features, norm.eps, norm.momentum)
        new.weight, new.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(new, name, buffer)
        if is_norm_with_activation(norm):
            timm_norm: Any = norm
            new.then = (timm_norm.drop, timm_norm.act)
        return new.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        for layer in self.then:
            x = layer.train(self.training)(x)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize (N, C, ...) by the statistics of all ranks, in training."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.ndim - 2))
        values = x.float()
        mean, count = global_mean(values)
        centred = values - mean.view(shape)
        variance, _ = global_mean(centred.square())
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def global_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Over all ranks: (N, C, ...) of each -> the means (C,), and of how many values each is, ()."""
    sums = x.sum(dim=(0, *range(2, x.ndim)))
    total = SumWithGradient.apply(torch.cat([sums, sums.new_tensor([x.numel() / x.shape[1]])]))
    count = total[-1].detach()
    return total[:-1] / count, count
