"""One optimization step of a method; the same code runs on one process and on many."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torchvision.models import ResNet

from schemas.precision import autocast
from train.config import TrainConfig
from train.distributed import average_in_rank_order, world_size
from train.encoders import compile_encoder_
from train.methods import Method
from train.optim import build_optimizer
from train.sync_bn import convert_sync_bn_
from train.timm_encoders import is_timm_encoder


def prepare_model_(method: Method, config: TrainConfig, device: torch.device) -> Method:
    """Prepare a method for training in place: device, channels_last, SyncBN and compilation.

    SyncBN and compilation follow the options. channels_last is the layout of the loader's images.
    """
    if config.sync_bn:
        convert_sync_bn_(method)
    method.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        for module in method.modules():
            if isinstance(module, ResNet) or is_timm_encoder(module):
                compile_encoder_(module)
    else:
        count_batches_on_host_(method)
    return method


def count_batches_on_host_(module: nn.Module) -> None:
    """Keep the norms' counters of batches in host memory, where counting launches no kernel.

    A compiled norm counts in its other kernels; there a counter on the host would be one more.
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.cpu()


def wrap_in_ddp(module: nn.Module, device: torch.device, has_unused: bool) -> nn.Module:
    """Wrap the module in DDP if there are several ranks: gradients are averaged over them.

    On CPUs they are added in the order of the ranks, so a resumed run computes the same bits as
    one that was never stopped: see `average_in_rank_order`.

    Buffers are not broadcast in forward passes: the queue is equal on all ranks anyway (at 65,536 x
    128 it would be 33 MB per step), and the batch normalization of each rank keeps its own running
    statistics; those of rank 0 are saved.

    Args:
        has_unused: the loss does not depend on some parameters; their gradients stay None.
    """
    if world_size() == 1:
        return module
    # versions of torch differ in the name of this option
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {name: False, "find_unused_parameters": has_unused}
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, **options)
    if device.type == "cpu":
        model.register_comm_hook(None, average_in_rank_order)
    return model


Check = Callable[[dict[str, Tensor]], None]
"""Called with the scalars of an optimization group before its weights are updated; it raises to
stop the run."""


class TrainingStep:
    """Runs one optimization step per call; its state is the optimizers' state."""

    def __init__(self, method: Method, config: TrainConfig, device: torch.device) -> None:
        self.method, self.config, self.device = method, config, device
        self.groups = method.optimization_groups()
        self.models = [wrap_in_ddp(group.module, device, group.has_unused) for group in self.groups]
        self.optimizers = [build_optimizer(group.module, config.optim) for group in self.groups]

    def __call__(
        self, micro_batches: Iterable[Any], lr: float, check: Check | None = None
    ) -> dict[str, Tensor]:
        """Update the weights of each optimization group by its mean loss over the micro-batches.

        Args:
            micro_batches: `config.grad_accum_steps` batches whose gradients are accumulated.
            lr: the learning rate of this step.

        Returns:
            The scalars of all groups, averaged over the micro-batches, on the device.
        """
        micro_batches = list(micro_batches)
        self.method.begin_step()
        reported: dict[str, Tensor] = {}
        for group, model, optimizer in zip(self.groups, self.models, self.optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            scalars = self.backward(model, micro_batches)
            if self.config.optim.clip_gradient is not None:
                trainable = [p for p in group.module.parameters() if p.requires_grad]
                norm = clip_grad_norm_(trainable, self.config.optim.clip_gradient)
                scalars["gradient_norm"] = norm
            if check is not None:
                check(scalars)
            for parameters in optimizer.param_groups:
                parameters["lr"] = lr * group.lr_scale
            optimizer.step()
            reported |= {group.prefix + name: value for name, value in scalars.items()}
        self.method.end_step()
        return reported

    def backward(self, model: nn.Module, micro_batches: list[Any]) -> dict[str, Tensor]:
        """Accumulate the gradients of a group's mean loss; ranks exchange them once."""
        total: dict[str, Tensor] = {}
        count = len(micro_batches)
        for number, batch in enumerate(micro_batches):
            is_last = number == count - 1
            skips_sync = isinstance(model, DistributedDataParallel) and not is_last
            with model.no_sync() if skips_sync else nullcontext():  # type: ignore[operator]
                with autocast(self.config.precision, self.device):
                    scalars = model(batch)
                # without a kernel for each scalar if there is nothing to average
                (scalars["loss"] if count == 1 else scalars["loss"] / count).backward()
            for name, value in scalars.items():
                part = value.detach() if count == 1 else value.detach() / count
                total[name] = total[name] + part if name in total else part
        return total

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
