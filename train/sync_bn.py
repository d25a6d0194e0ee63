"""Batch normalization over the images of all ranks (SyncBN), on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distributed import SumWithGradient, all_gather, world_size


def convert_sync_bn_(module: nn.Module) -> nn.Module:
    """Replace each batch normalization in `module` by one over all ranks; keep state_dict keys."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm.convert(child))
    return module


def is_norm_with_activation(layer: nn.Module) -> bool:
    """Return True for timm's batch normalization with dropout and activation in the same layer."""
    return isinstance(layer, _BatchNorm) and hasattr(layer, "act") and hasattr(layer, "drop")


class GlobalBatchNorm(_BatchNorm):
    """Batch normalization over the images of all ranks, with gradients back to all of them.

    Ranks may have different numbers of values, as in detectors. A CPU layer takes two reductions,
    the mean before the squares, to avoid cancellation; a GPU layer uses `FusedGlobalNorm`.
    """

    followers: tuple[nn.Module, ...] = ()
    """Modules that timm's layers apply to the normalized values; they have no weights, so they add
    no keys."""

    @classmethod
    def convert(cls, norm: _BatchNorm) -> "GlobalBatchNorm":
        """Build a layer that shares the parameters and buffers of `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum)
        new.weight, new.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(new, name, buffer)
        if is_norm_with_activation(norm):
            timm_norm: Any = norm
            new.followers = (timm_norm.drop, timm_norm.act)
        return new.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any (N, C, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        for layer in self.followers:
            x = layer.train(self.training)(x)
        return x

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize (N, C, ...), in training by the statistics of all ranks."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if x.device.type != "cpu":
            self.num_batches_tracked.add_(1)
            running = (self.running_mean, self.running_var)
            return FusedGlobalNorm.apply(
                x, self.weight, self.bias, *running, self.eps, self.momentum
            )
        shape = (1, -1, *[1] * (x.ndim - 2))
        values = x.float()
        mean, count = average_globally(values)
        centered = values - mean.view(shape)
        variance, _ = average_globally(centered.square())
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


TINY = 1e-30
"""Count used for a rank that has no values: with 0 the kernel would divide 0 by 0, and in float32
such a small count changes no sum."""


class FusedGlobalNorm(torch.autograd.Function):
    """Batch normalization over all ranks by the GPU kernels of torch's SyncBatchNorm.

    torch's own function selects the ranks that have values by a mask, three times per layer, and
    each time the host waits for the GPU. Here the counts of other ranks stay on the GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
        momentum: float,
    ) -> Tensor:
        """Normalize (N, C, ...), N may be 0; update the running statistics in place."""
        x, channels = make_dense(x), x.shape[1]
        if x.numel():
            mean, scale = torch.batch_norm_stats(x, eps)
            count = mean.new_full((1,), x.numel() // channels)
        else:
            mean, scale = weight.new_zeros(channels), weight.new_ones(channels)
            count = weight.new_zeros(1)
        means, scales, counts = all_gather(torch.cat([mean, scale, count])[None]).split(channels, 1)
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            x,
            means,
            scales,
            running_mean,
            running_var,
            momentum,
            eps,
            counts.flatten().clamp(min=TINY),
        )
        ctx.save_for_backward(x, weight, mean, scale, counts.int())
        if not x.numel():
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, mean, scale, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, counts = ctx.saved_tensors
        gradient = make_dense(gradients[0])
        x_grad: Tensor | None = None
        if x.numel():
            sums, products, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
                gradient, x, mean, scale, weight, *ctx.needs_input_grad[:3]
            )
            total = torch.cat([sums, products])
        else:  # DDP waits for a gradient of every weight
            x_grad, weight_grad, bias_grad = map(torch.zeros_like, (x, weight, weight))
            total = mean.new_zeros(2 * len(mean))
        if ctx.needs_input_grad[0]:
            dist.all_reduce(total)
            if x.numel():
                sums, products = total.chunk(2)
                x_grad = torch.batch_norm_backward_elemt(
                    gradient, x, mean, scale, weight, sums, products, counts
                )
        return x_grad, weight_grad, bias_grad, None, None, None, None


def make_dense(x: Tensor) -> Tensor:
    """Return (N, C, ...) in a layout that the kernels accept: channels_last or contiguous."""
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()


def average_globally(x: Tensor) -> tuple[Tensor, Tensor]:
    """Average (N, C, ...) over all ranks; return means (C,) and the number of values in each ()."""
    sums = x.sum(dim=(0, *range(2, x.ndim)))
    total = SumWithGradient.apply(torch.cat([sums, sums.new_tensor([x.numel() / x.shape[1]])]))
    count = total[-1].detach()
    return total[:-1] / count, count
