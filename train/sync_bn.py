"""Batch normalisation over the images of all ranks (SyncBN), on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distributed import SumWithGradient, all_gather, world_size


def synchronised(module: nn.Module) -> nn.Module:
    """The module with each batch normalisation over all ranks; state_dict keys stay."""
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

    Ranks may have different numbers of values: detectors do. On a CPU two reductions a layer, the
    mean before the squares, so that nothing is lost to cancellation; on a GPU `FusedGlobalNorm`.
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
        mean, count = global_mean(values)
        centred = values - mean.view(shape)
        variance, _ = global_mean(centred.square())
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


TINY = 1e-30
"""Values that a rank without any is taken to have: the kernel would divide 0 by 0, and in float32
so few change no sum."""


class FusedGlobalNorm(torch.autograd.Function):
    """Batch normalization over all ranks by the GPU kernels of torch's SyncBatchNorm.

    torch's own function picks the ranks that have any values by a mask, three times a layer, and
    each time the host waits for the GPU. Here the host never learns what the others have.
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
        """Normalize (N, C, ...), N may be 0; the running statistics move in place."""
        x, channels = packed(x), x.shape[1]
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
        gradient = packed(gradients[0])
        of_x: Tensor | None = None
        if x.numel():
            sums, products, of_weight, of_bias = torch.batch_norm_backward_reduce(
                gradient, x, mean, scale, weight, *ctx.needs_input_grad[:3]
            )
            total = torch.cat([sums, products])
        else:  # DDP waits for a gradient of every weight
            of_x, of_weight, of_bias = map(torch.zeros_like, (x, weight, weight))
            total = mean.new_zeros(2 * len(mean))
        if ctx.needs_input_grad[0]:
            dist.all_reduce(total)
            if x.numel():
                sums, products = total.chunk(2)
                of_x = torch.batch_norm_backward_elemt(
                    gradient, x, mean, scale, weight, sums, products, counts
                )
        return of_x, of_weight, of_bias, None, None, None, None


def packed(x: Tensor) -> Tensor:
    """Return (N, C, ...) as the kernels take it: channels_last as it is, else contiguous."""
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_channels_last else x.contiguous()


def global_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Over all ranks: (N, C, ...) of each -> the means (C,), and of how many values each is, ()."""
    sums = x.sum(dim=(0, *range(2, x.ndim)))
    total = SumWithGradient.apply(torch.cat([sums, sums.new_tensor([x.numel() / x.shape[1]])]))
    count = total[-1].detach()
    return total[:-1] / count, count
