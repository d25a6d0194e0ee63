"""Find operations that make the host wait for the device, on a machine without one."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)


class HostWaits(TorchDispatchMode):
    """Raise where a tensor that stands for one on the device makes the host wait.

    `meta` is taken for the device: nothing is computed, so a step of any size is cheap. Waits are
    reading a number (`.item()`, `.tolist()`, `if tensor`), indexing by a mask, copies from the
    device, and copies to it out of memory that is not pinned (`pinned` lists those that are).
    """

    def __init__(self, pinned: list[Tensor] | None = None) -> None:
        super().__init__()
        self.pinned = [] if pinned is None else pinned

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.is_meta for x in tensors)
        if on_device and func in READS:
            raise AssertionError(f"{func} waits for the device")
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            given = [x for x in args[1] if x is not None]
            if on_device and any(x.dtype == torch.bool for x in given):
                raise AssertionError(f"{func} by a mask waits for the device")
            if args[0].is_meta and any(not x.is_meta for x in given):
                raise AssertionError(f"{func} by an index in host memory waits for the device")
        if func in (aten._to_copy.default, aten.copy_.default):
            self.check_copy(func, args, kwargs)
        return func(*args, **kwargs)

    def check_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func == aten.copy_.default:
            source, target = args[1], args[0].device
        else:
            source, target = args[0], kwargs.get("device") or args[0].device
        if source.is_meta and target.type == "cpu":
            raise AssertionError(f"{func} from the device waits for it")
        is_pinned = any(source is tensor for tensor in self.pinned)
        if not source.is_meta and target.type == "meta" and not is_pinned:
            raise AssertionError(f"{func} out of pageable memory waits for the device")
