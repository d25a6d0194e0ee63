"""Find operations that make the host wait for the device, on a machine without one."""

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import pipeline.blur
import pipeline.photometric
import pipeline.pixels
import pipeline.regions
import pipeline.rng
import train.distributed
import train.methods.adios
from pipeline.compiling import Compiled

aten = torch.ops.aten
GPU = torch.device("meta")
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
)
"""Operators whose result, or the shape of it, the host reads from the device."""

COPYING: tuple[ModuleType, ...] = (
    pipeline.blur,
    pipeline.photometric,
    pipeline.pixels,
    pipeline.regions,
    pipeline.rng,
    train.distributed,
    train.methods.adios,
)
"""Modules that copy host memory to the device by `pipeline.devices.to_device`."""


class HostWaits(TorchDispatchMode):
    """Raise AssertionError where an operator on the device makes the host wait for it.

    Tensors on the device `meta` stand for those on a GPU: shapes without memory, so a step of any
    size is cheap. (Fake tensors of a device `cuda` have no backward pass where there is no GPU.)
    Operators on host tensors run as they are. Waits are: reading a number (`.item()`, `.tolist()`,
    `if tensor`), indexing by a mask, copies from the device, and copies to it other than by
    `to_device`, which alone pins the memory.

    Attributes:
        is_checking: False while things are built, when a wait does no harm.
        operators: how many ran on the device while checking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_checking = True
        self.operators = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        if self.is_checking and (target.type == "meta" or any(x.is_meta for x in tensors)):
            self.operators += 1
            check(func, args, kwargs)
            if func is aten._fused_sgd_.default:
                return None  # in place, and not implemented for `meta`
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Skip all checks in this block."""
        self.is_checking = False
        try:
            yield
        finally:
            self.is_checking = True


class NewTensors(TorchFunctionMode):
    """Raise AssertionError if a tensor on the device is made from Python numbers.

    On a GPU that copies from pageable memory; on `meta` nothing is copied, so no operator shows it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.is_meta:
            raise AssertionError(f"{func} out of pageable memory waits for the device")
        return result


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Stand for `pipeline.devices.to_device`, which pins host memory and does not wait."""
    assert not tensor.is_meta, "to_device is for host memory"
    with _disable_current_modes():
        return tensor.to(device)


def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise AssertionError if this operator waits; an argument or the result is on the GPU."""
    if func in READS:
        raise AssertionError(f"{func} waits for the device")
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        given = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool for index in given):
            raise AssertionError(f"{func} by a mask waits for the device")
        if any(index.device.type != args[0].device.type for index in given):
            raise AssertionError(f"{func} by an index in host memory waits for the device")
    if func is aten.copy_.default:
        target, source = args[0].device, args[1].device
    elif func is aten._to_copy.default:
        source = args[0].device
        target = torch.device(kwargs.get("device") or source)
    else:
        return
    if source.type == "meta" and target.type == "cpu":
        raise AssertionError(f"{func} from the device waits for it")
    if source.type == "cpu" and target.type == "meta":
        raise AssertionError(f"{func} out of pageable memory waits for the device")


@contextlib.contextmanager
def pretend_gpu(is_compiled: bool = False) -> Iterator[HostWaits]:
    """Run this block as on a GPU and raise if the host waits.

    Args:
        is_compiled: run the functions that would be compiled instead of their uncompiled fallbacks.
    """

    def try_call(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs) if is_compiled else None

    autocast, waits = torch.autocast, HostWaits()
    with contextlib.ExitStack() as stack:
        for module in COPYING:
            stack.enter_context(mock.patch.object(module, "to_device", to_device))
        stack.enter_context(mock.patch.object(Compiled, "try_call", try_call))
        # `meta` has no autocast; casts do not wait
        none = mock.Mock(side_effect=lambda *_, **__: autocast("cpu", enabled=False))
        stack.enter_context(mock.patch.object(torch, "autocast", none))
        # the fused optimizer refuses devices that it does not list
        fused = mock.patch.object(sys.modules["torch.optim.sgd"], "_device_dtype_check_for_fused")
        stack.enter_context(fused)
        stack.enter_context(NewTensors())
        stack.enter_context(waits)
        yield waits
