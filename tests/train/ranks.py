"""Persistent gloo processes that run functions together, and tiny encoders for them."""

import os
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from train.encoders import ENCODERS


class Tiny(nn.Module):
    """A network (N, 3, 4, 4) -> (N, 6): convolution, optional batch normalization, ReLU, mean."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc: nn.Module = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


def add_tiny_encoders() -> None:
    ENCODERS["tiny"] = lambda weights: Tiny(norm=False)
    ENCODERS["tiny_norm"] = lambda weights: Tiny(norm=True)


def random_batch(size: int, hard_negatives: int, seed: int = 0) -> SimpleNamespace:
    """Draw a batch like those of pipeline.MaskedViews, with 4 x 4 pixels."""
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 3, 4, 4, generator=generator)

    hard = images(hard_negatives * size) if hard_negatives else None
    label = torch.randint(3, (size,), generator=generator)
    return SimpleNamespace(query=images(size), key=images(size), hard_negative=hard, label=label)


def get_preloaded_context() -> ForkServerContext:
    """Return the context of processes that are forked from one that has imported torch once."""
    # pyarrow's allocator would start a thread there, and a fork copies the locks that it holds
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.preloaded"])
    return context


class Ranks:
    """`ranks(function, *args)` calls it on every rank at once and returns what each returned."""

    def __init__(self, size: int) -> None:
        context = get_preloaded_context()
        store = Path(tempfile.mkdtemp()) / "store"
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Any, *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=20)


def serve(rank: int, size: int, store: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    add_tiny_encoders()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send(function(*args))
        except BaseException as error:
            pipe.send(error)
    dist.destroy_process_group()
