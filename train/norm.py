"""Batch normalisation over the images of all ranks (SyncBN), on GPUs and on CPUs."""

import torch
from torch import Tensor, nn

from train.distributed import SumWithGradient, world_size


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with each batch normalisation over all ranks; state_dict keys stay.

    On a GPU it is torch's SyncBatchNorm, which refuses other devices; on a CPU ours.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, GlobalBatchNorm2d.of(child))
    return module


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are of all ranks' images, with gradients back to all of them.

    Every rank has equally many images: the loader sees to it. Two reductions a layer, the mean
    before the squares, so that nothing is lost to cancellation.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "GlobalBatchNorm2d":
        """The same parameters and buffers, not copies of them."""
        new = cls(norm.num_features, norm.eps, norm.momentum)
        new.weight, new.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers():
            setattr(new, name, buffer)
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        values = x.float()
        mean = global_mean(values)
        centred = values - mean.view(1, -1, 1, 1)
        variance = global_mean(centred.square())
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def global_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) of each rank -> (C,), the mean over all images and places of all ranks."""
    return SumWithGradient.apply(x.mean(dim=(0, 2, 3))) / world_size()
