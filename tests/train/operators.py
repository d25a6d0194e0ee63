"""List the operators that run, each of which would be at least one kernel on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ListOperators(TorchDispatchMode):
    """List the operators that run.

    Attributes:
        names: name of each operator, such as `aten::add`.
        tensors: its arguments that are tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.tensors: list[list[Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        self.names.append(func._schema.name)
        self.tensors.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        return func(*args, **(kwargs or {}))
