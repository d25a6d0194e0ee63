"""Compile tensor functions for a GPU, and fall back to eager PyTorch where that is impossible."""

import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Maximum number of compiled variants of one function in a process; there is one per recipe, batch
size and branch (PyTorch's default is 8)."""

OLDEST_CAPABILITY = (7, 0)
"""Lowest compute capability that Inductor's kernels run on (torch/_inductor/scheduler.py)."""

P = ParamSpec("P")
Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


@functools.cache
def explain_missing_compiler(device: torch.device) -> str | None:
    """Return why this machine cannot compile for its GPU, or None if it can; log the reason."""
    reason = find_compile_obstacle(device)
    if reason is not None:
        log.warning(
            f"the views are made without a compiler ({reason}), which takes about ten times as "
            "many kernels per batch"
        )
    return reason


def find_compile_obstacle(device: torch.device) -> str | None:
    """Return why PyTorch cannot compile for this GPU, or None if it can."""
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE is set"
    if find_spec("triton") is None:
        return "the package triton is missing"
    # Triton builds its launchers with a C compiler
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler: install gcc or clang, or set CC"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"Triton does not support GPUs of compute capability {capability[0]}.{capability[1]}"
    return None


class Compiled:
    """A function that is compiled when its tensors are on a GPU.

    Args:
        function: takes tensors and constants and has no side effects.
        options: Inductor settings (torch/_inductor/config.py).
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        self.function, self.options = function, options
        self._failed = False

    def try_call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result, or None if it cannot be compiled.

        This is the case for tensors on a CPU, without a compiler, and after a failed compilation,
        which is reported by one warning.
        """
        if self._failed or not is_compilable((args, kwargs)):
            return None
        config, errors = torch._dynamo.config, torch._dynamo.exc
        has_limit = takes_recompile_limit()
        try:
            with nullcontext() if has_limit else config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self._compiled(*args, **kwargs)
        except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as error:
            log.warning(
                f"{self.function.__qualname__} could not be compiled and runs uncompiled: {error}"
            )
            self._failed = True
            return None

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        # not in __init__: importing TorchDynamo takes seconds, which a CPU run or --help should not
        # pay
        limit: dict[str, Any] = {}
        if takes_recompile_limit():
            limit["recompile_limit"] = RECOMPILE_LIMIT
        return torch.compile(
            self.function, fullgraph=True, dynamic=False, options=self.options, **limit
        )


@functools.cache
def takes_recompile_limit() -> bool:
    """Return whether `torch.compile` takes a limit of its own for each function.

    Older versions have only a global one, and to set it in each call takes the host as long as
    launching several kernels.
    """
    return "recompile_limit" in inspect.signature(torch.compile).parameters


def is_compilable(arguments: Any) -> bool:
    """Return whether the first tensor among the arguments is on a GPU that we can compile for."""
    first = next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return first.device.type == "cuda" and explain_missing_compiler(first.device) is None


def compile_on_gpu(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorate a tensor function so that it runs compiled when its tensors are on a GPU."""
    compiled = Compiled(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        result = compiled.try_call(*args, **kwargs)
        return function(*args, **kwargs) if result is None else result

    return call
