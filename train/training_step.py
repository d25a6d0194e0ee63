"""One optimiser step of a method: the same lines for one process and for many."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torchvision.models import ResNet

from train.config import TrainConfig, autocast
from train.distributed import mean_in_rank_order, world_size
from train.encoders import compile_encoder_
from train.methods import Method
from train.sync_bn import synchronised
from train.optim import build_optimizer
from train.timm_encoders import is_timm_encoder


def placed(method: Method, config: TrainConfig, device: torch.device) -> Method:
    """The method on its device, in training, with the layers and the compiler that were asked for.

    Its memory is channels_last, as the loader's images are.
    """
    if config.sync_bn:
        synchronised(method)
    method.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        for module in method.modules():
            if isinstance(module, ResNet) or is_timm_encoder(module):
                compile_encoder_(module)
    return method


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module under DDP where there are several ranks: gradients are means over them.

    On CPUs they are summed in the order of the ranks, so that a run that goes on computes the bits
    of one that was never stopped: see `mean_in_rank_order`.

    Buffers are not broadcast: the queue is equal on all ranks anyhow (at 65,536 x 128 it would be
    33 MB a step), and each rank's batch normalisation keeps its own running statistics; rank 0's
    are the ones saved.
    """
    if world_size() == 1:
        return module
    # torch 2.15 renamed the option; the range of versions that we run on has both names
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {name: False}
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, **options)
    if device.type == "cpu":
        model.register_comm_hook(None, mean_in_rank_order)
    return model


Check = Callable[[dict[str, Tensor]], None]
"""Called with what a player reports, before its weights move; raises to stop there."""


class Step:
    """`step(parts, lr)` is one step of the method; its state is that of the optimisers."""

    def __init__(self, method: Method, config: TrainConfig, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        self.players = method.players()
        self.models = [parallel(player.module, device) for player in self.players]
        self.optimizers = [build_optimizer(player.module, config.optim) for player in self.players]

    def __call__(
        self, parts: Iterable[Any], lr: float, check: Check | None = None
    ) -> dict[str, Tensor]:
        """Move the weights of each player along the gradient of its mean loss over the parts.

        Args:
            parts: `config.accumulate` batches.
            lr: the learning rate of this step.

        Returns:
            What the players report, means over the parts, on the device.
        """
        parts = list(parts)
        self.method.begin_step()
        reported: dict[str, Tensor] = {}
        for player, model, optimizer in zip(
            self.players, self.models, self.optimizers, strict=True
        ):
            optimizer.zero_grad(set_to_none=True)
            scalars = self.backward(model, parts)
            if self.config.optim.clip_gradient is not None:
                trainable = [p for p in player.module.parameters() if p.requires_grad]
                norm = clip_grad_norm_(trainable, self.config.optim.clip_gradient)
                scalars["gradient_norm"] = norm
            if check is not None:
                check(scalars)
            for group in optimizer.param_groups:
                group["lr"] = lr * player.rate
            optimizer.step()
            reported |= {player.prefix + name: value for name, value in scalars.items()}
        self.method.end_step()
        return reported

    def backward(self, model: nn.Module, parts: list[Any]) -> dict[str, Tensor]:
        """Add the gradients of one player's mean loss; ranks exchange them once."""
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(parts):
            last = number == len(parts) - 1
            apart = isinstance(model, DistributedDataParallel) and not last
            with model.no_sync() if apart else nullcontext():  # type: ignore[operator]
                with autocast(self.config.precision, self.device):
                    scalars = model(batch)
                (scalars["loss"] / len(parts)).backward()
            for name, value in scalars.items():
                total[name] = total.get(name, 0) + value.detach() / len(parts)
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
