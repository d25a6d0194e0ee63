"""Select a device by name, and explain why PyTorch cannot use it."""

import os

import torch
from torch import Tensor

from schemas import UserError

NO_GPU_MESSAGES = ("Found no NVIDIA driver", "No CUDA GPUs are available", "not compiled with CUDA")
"""PyTorch's messages on a machine without a GPU; any other message means that the GPU is broken."""
CHOOSE_CPU = 'choose device "cpu" (in a command: --device cpu)'


def parse_device(name: str) -> torch.device:
    """Return the device called `cpu`, `cuda` (the current GPU), `cuda:N` or `auto`.

    `auto` is `cuda` on a machine with a GPU and `cpu` on one without.

    Raises:
        UserError: there is no such device, or `auto` meets a GPU that PyTorch cannot use, for
            example because the driver is too old: training on the CPU instead would take days.
    """
    if name == "auto":
        reason = explain_missing_gpu()
        if reason is None:
            name = "cuda"
        elif any(message in reason for message in NO_GPU_MESSAGES):
            name = "cpu"
        else:
            raise UserError(f"device auto: {reason}; fix that, or {CHOOSE_CPU}")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: choose cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: choose cpu or cuda")
    if device.type == "cpu":
        return device
    if reason := explain_missing_gpu():
        raise UserError(f"device {name!r}: PyTorch sees no GPU here: {reason}; {CHOOSE_CPU}")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if device.index >= count:
        raise UserError(f"device {name!r}: the GPUs of this machine are 0 .. {count - 1}")
    return device


def explain_missing_gpu() -> str | None:
    """Return PyTorch's own reason for seeing no GPU, or None if it sees one."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        return str(error).split(". ")[0].strip()
    return "it gives no reason"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without waiting for work that runs there.

    A tensor that is there already is returned as it is; pinned memory is not copied on the host.
    """
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def count_cpu_threads() -> int:
    """Return this process's share of the cores, which torchrun's ranks on one machine divide."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
