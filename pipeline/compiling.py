"""Functions of tensors that are compiled for a GPU, and what happens where they cannot be."""

import functools
import logging
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Compiled forms of one function in one process: one per recipe, batch size and branch (PyTorch's
default is 8)."""

OLDEST_CAPABILITY = (7, 0)
"""The oldest GPU that Inductor's kernels run on (torch/_inductor/scheduler.py)."""

P = ParamSpec("P")


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Return what keeps this machine from compiling for its GPU, None if nothing does; log it."""
    reason = find_reason(device)
    if reason is not None:
        log.warning(
            f"the views are made without a compiler ({reason}): about 700 kernels per batch "
            "instead of about 60"
        )
    return reason


def find_reason(device: torch.device) -> str | None:
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    if find_spec("triton") is None:
        return "the package triton is missing"
    # what Triton builds its launchers with
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler: install gcc or clang, or name one by CC"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"Triton knows no GPU of compute capability {capability[0]}.{capability[1]}"
    return None


class Compiled:
    """A function that is compiled for a GPU.

    Args:
        function: of tensors and constants; without side effects.
        options: Inductor's settings (torch/_inductor/config.py).
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        self.function, self.options = function, options
        self._compiled: Callable[..., Any] | None = torch.compile(
            function, fullgraph=True, dynamic=False, options=options
        )

    def try_call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result, or None where it cannot be compiled.

        That is so for tensors on a CPU, without a compiler, and after compiling failed, which a
        warning says once.
        """
        if self._compiled is None or not is_compilable((args, kwargs)):
            return None
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self._compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning(
                f"{self.function.__qualname__} could not be compiled and runs without: {error}"
            )
            self._compiled = None
            return None


def is_compilable(arguments: Any) -> bool:
    """Whether the first tensor among the arguments is on a GPU that we can compile for."""
    first = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return first.device.type == "cuda" and why_not_compiled(first.device) is None


def compiled_on_gpu(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function of tensors so that it runs compiled where they are on a GPU."""
    compiled = Compiled(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        result = compiled.try_call(*args, **kwargs)
        return function(*args, **kwargs) if result is None else result

    return call
