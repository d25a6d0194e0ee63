"""The device by its name, and what keeps PyTorch from it."""

import os

import torch
from torch import Tensor

from schemas import UserError

ABSENT = ("Found no NVIDIA driver", "No CUDA GPUs are available", "not compiled with CUDA")
"""What PyTorch says where there is no GPU to be had; anything else is a GPU that does not work."""


def device_of(name: str) -> torch.device:
    """`cpu`, `cuda` (the current GPU), `cuda:N`, or `auto`: cuda where there is a GPU.

    Raises:
        UserError: no such device. Also for `auto` where there is a GPU that PyTorch cannot use,
            say, because its driver is too old: a CPU would take its place for days.
    """
    if name == "auto":
        reason = why_no_gpu()
        if reason is None:
            name = "cuda"
        elif any(known in reason for known in ABSENT):
            name = "cpu"
        else:
            raise UserError(f"device auto: {reason}; mend that, or choose --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: choose cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: choose cpu or cuda")
    if device.type == "cpu":
        return device
    if reason := why_no_gpu():
        raise UserError(f"device {name!r}: PyTorch sees no GPU here: {reason}; choose --device cpu")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs here")
    return device


def why_no_gpu() -> str | None:
    """Why PyTorch sees no GPU, in its own words; None where it sees one."""
    if torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        return str(error).split(". ")[0].strip()
    return "it gives no reason"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy host memory to the device without waiting for what the device does now."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def cpu_threads() -> int:
    """Return this process's share of the cores: torchrun's ranks on this machine share them."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
