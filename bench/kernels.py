"""Count the GPU kernels and bytes of a batch's views on a machine without a GPU.

The tensors are PyTorch's fake ones: shapes without memory, on a device `cuda` that need not exist.
Operators that run one by one count as one kernel each, which reads its inputs and writes its
outputs once; a view of memory counts as nothing. Compiled functions are lowered by Inductor for an
H100: it decides what is fused and generates the kernels, and its scheduler reports the bytes that
each of them reads and writes. No kernel is compiled or run, so the count says nothing about
arithmetic or caches; the time that the bytes take at the card's bandwidth is a lower bound.
"""

import contextlib
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils._triton import has_triton

from pipeline import Recipe, assemble, blur, get_recipe, photometric, pixels, rng
from pipeline.compiling import Compiled
from schemas.errors import UserError

H100_BANDWIDTH = 3.35e12
"""Memory bandwidth in bytes per second (NVIDIA's data sheet of the H100 SXM)."""

H100 = types.SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=80 << 30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
"""Properties that Inductor asks a GPU for (CUDA C++ Programming Guide, compute capability 9.0)."""

UNCOUNTED = ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh", "aten::empty", "prim::")


@dataclass
class Cost:
    """Number of launched kernels, and the bytes that they read and write."""

    kernels: int = 0
    bytes: int = 0


def count_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; an expanded axis counts once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


class CountKernels(TorchDispatchMode):
    """Run operators on fake GPU tensors and count them; operators on the host run normally."""

    def __init__(self, fake: FakeTensorMode, cost: Cost) -> None:
        super().__init__()
        self.fake, self.cost = fake, cost

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        if not on_gpu and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or name.startswith(UNCOUNTED):
            return out
        inputs = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.cost.kernels += 1
        if name == "aten::index":  # reads only the rows that it returns
            self.cost.bytes += 2 * sum(map(count_bytes, outputs))
        elif name == "aten::index_put_":
            self.cost.bytes += 2 * count_bytes(args[2])
        else:
            self.cost.bytes += sum(map(count_bytes, [*inputs, *outputs]))
        return out


def lower(
    function: Any, options: dict[str, Any], fake: FakeTensorMode, args: Any, kwargs: Any
) -> Cost:
    """Generate the kernels for an H100 with Inductor, and count them."""
    from torch._inductor import config, metrics
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    leaves, form = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        full = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            full[place] = tensor
        own_args, own_kwargs = tree_unflatten(full, form)
        return function(*own_args, **own_kwargs)

    tensors = [leaves[place] for place in places]
    graph = make_fx(call, decomposition_table=select_decomp_table(), tracing_mode="fake")(*tensors)
    with fake_h100(), config.patch(options):
        metrics.reset()
        lowering = GraphLowering(graph, example_inputs=tensors, shape_env=fake.shape_env)
        with (
            V.set_graph_handler(lowering),
            V.set_fake_mode(fake),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*tensors)
            lowering.codegen()
            moved, _, _ = lowering.count_bytes()
    return Cost(metrics.generated_kernel_count, int(moved))


@contextlib.contextmanager
def fake_h100() -> Iterator[None]:
    """Answer Inductor's and Triton's queries to the driver as an H100 would."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    has_triton.cache_clear()  # it remembers what an earlier compilation for the CPU found
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("_lazy_init", lambda: None),
            ("_get_device_properties", lambda *_: H100),
            ("get_device_properties", lambda *_: H100),
            ("get_device_capability", lambda *_: (9, 0)),
            ("current_device", lambda: 0),
            ("device_count", lambda: 1),
            ("is_available", lambda: True),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        try:
            yield
        finally:
            triton.runtime.driver._active = before
            has_triton.cache_clear()


def count(recipe: Recipe, size: int, compiled: bool = True) -> Cost:
    """Count the kernels and bytes that make the views of a batch on a GPU, including masks."""
    # FakeTensorMode itself does this where there is no GPU.
    if not torch.cuda.is_available():
        torch._C._ensureCUDADeviceGuardSet()
    fake, cost = FakeTensorMode(allow_non_fake_inputs=True), Cost()
    device = torch.device("cuda", 0)

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes(), fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def try_call(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        if not compiled:
            return None
        with torch.utils._python_dispatch._disable_current_modes():
            own = lower(self.function, self.options or {}, fake, args, kwargs)
            cost.kernels += own.kernels
            cost.bytes += own.bytes
            with fake:
                return self.function(*args, **kwargs)

    side, grid = recipe.crop_size, recipe.grid
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "_lazy_init"))
        for module in (rng, photometric, blur, pixels):
            stack.enter_context(mock.patch.object(module, "to_device", to_device))
        stack.enter_context(mock.patch.object(Compiled, "try_call", try_call))
        with fake:
            pair = [
                assemble.View(
                    torch.empty(size, side, side, 3, dtype=torch.uint8, device=device),
                    torch.empty(size, grid, grid, device=device),
                    torch.zeros(size, 4),
                )
                for _ in range(2)
            ]
        with CountKernels(fake, cost):
            own = rng.BatchRng(0, 0, np.arange(size), device)
            assemble.assemble(pair[0], pair[1] if recipe.pair else None, recipe, own, frozenset())
    return cost


@dataclass(frozen=True)
class Options:
    """Count the kernels and bytes that make a batch's views, with and without a compiler."""

    recipes: tuple[str, ...] = ("hp", "blur", "mean")
    """Recipes to count; `maskco` draws its boxes on a real device and cannot be counted."""
    batch_size: int = 256
    """Samples per batch."""
    crop_size: int = 224
    """Side of a view in pixels."""


def build_table(options: Options) -> str:
    """Count each recipe with and without a compiler and return the table.

    Raises:
        UserError: an unknown recipe, or one that cannot be counted.
    """
    recipes = {
        name: replace(get_recipe(name), crop_size=options.crop_size) for name in options.recipes
    }
    for name, recipe in recipes.items():
        if recipe.regions:
            raise UserError(
                f"--recipes {name}: it draws boxes on a real device and cannot be counted; leave "
                "it out"
            )
    lines = [
        f"Views of a batch of {options.batch_size} at {options.crop_size} pixels; time at "
        f"{H100_BANDWIDTH / 1e12:.2f} TB/s (H100)",
        "",
        "| recipe | compiled | kernels | GB | ms, lower bound |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, recipe in recipes.items():
        for compiled in (False, True):
            cost = count(recipe, options.batch_size, compiled)
            lines.append(
                f"| `{name}` | {'yes' if compiled else 'no'} | {cost.kernels} | "
                f"{cost.bytes / 1e9:.2f} | {1e3 * cost.bytes / H100_BANDWIDTH:.2f} |"
            )
    return "\n".join(lines)
