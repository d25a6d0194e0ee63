"""One optimiser step of a method: the same lines for one process and for many."""

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torchvision.models import ResNet

from train.config import TrainConfig, autocast
from train.distributed import world_size
from train.methods import Method
from train.norm import synchronised
from train.optim import build_optimizer


def placed(method: Method, config: TrainConfig, device: torch.device) -> Method:
    """The method on its device, in training, with the layers and the compiler that were asked for.

    Its memory is channels_last, as the loader's images are.
    """
    if config.sync_bn:
        synchronised(method, device)
    method.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        for module in method.modules():
            if isinstance(module, ResNet):
                module.compile()
    return method


def parallel(method: Method) -> nn.Module:
    """The method under DDP where there are several ranks: gradients are means over them.

    Buffers are not broadcast: the queue is equal on all ranks anyhow (at 65,536 x 128 it would be
    33 MB a step), and each rank's batch normalisation keeps its own running statistics; rank 0's
    are the ones saved.
    """
    if world_size() == 1:
        return method
    # torch 2.15 renamed the option; the range of versions that we run on has both names
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **options)


class Step:
    """`backward` and then `update` are one step.

    Attributes:
        method, optimizer: what it moves.
    """

    def __init__(self, method: Method, config: TrainConfig, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        self.model = parallel(method)
        self.optimizer = build_optimizer(method, config.optim)

    def backward(self, parts: Iterable[Any]) -> dict[str, Tensor]:
        """Gradients of the mean loss over the parts of a step.

        Args:
            parts: `config.accumulate` batches; each is asked for once the one before it is done.

        Returns:
            What the method reports, means over the parts, on the device.
        """
        count = self.config.accumulate
        self.method.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(parts):
            with self.apart() if number < count - 1 else nullcontext():
                with autocast(self.config.precision, self.device):
                    scalars = self.model(batch)
                (scalars["loss"] / count).backward()
            for name, value in scalars.items():
                total[name] = total.get(name, 0) + value.detach() / count
        if self.config.optim.clip_gradient is not None:
            trainable = [p for p in self.method.parameters() if p.requires_grad]
            total["gradient_norm"] = clip_grad_norm_(trainable, self.config.optim.clip_gradient)
        return total

    def update(self, lr: float) -> None:
        """Move the weights along the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.method.end_step()

    def apart(self) -> AbstractContextManager:
        """Gradients stay this rank's own."""
        return (
            self.model.no_sync()
            if isinstance(self.model, DistributedDataParallel)
            else nullcontext()
        )
