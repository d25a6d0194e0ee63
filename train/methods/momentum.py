"""Momentum branch and queue of keys, shared by MoCo v2 and MaskCo."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from schemas import UserError
from train.distributed import all_gather
from train.encoders import build_encoder
from train.methods.method import Method, MethodConfig, Setup, build_projector


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(MethodConfig):
    """Options with the numbers of MoCo v2 (facebookresearch/moco)."""

    queue: int = 65_536
    """Number of keys that are remembered as negatives; at least the global batch."""
    ema_momentum: float = 0.999
    """Share of its own weights that the momentum branch keeps in each step, 0 to 1."""
    temperature: float = 0.2
    """tau: similarities are divided by it."""
    projection: int = 128
    """Width of the projected embedding."""
    hidden: int | None = None
    """Width of the head's hidden layer; by default that of the encoder's features."""


class MomentumMethod(Method):
    """A method whose `forward` remembers its keys; the end of the step puts them into the queue.

    Raises:
        UserError: the queue is shorter than the global batch.
    """

    queue: Tensor
    """(K, D) unit keys of earlier steps, the same on all ranks."""
    queue_next: Tensor
    """() int64, the row to write next."""

    def __init__(self, config: MomentumConfig, setup: Setup) -> None:
        super().__init__()
        if config.queue < setup.batch_size:
            raise UserError(
                f"queue {config.queue}: smaller than the batch of {setup.batch_size}, whose keys "
                "must all fit into it; use a longer --queue or a smaller --batch-size"
            )
        self.encoder, self.width = build_encoder(setup.encoder, setup.stem)
        self.head = build_projector(self.width, config.hidden, config.projection)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.update_average_ = get_ema_multi_avg_fn(config.ema_momentum)

        # Drawn from `seed` alone, so equal on all ranks whatever was drawn before.
        self.generator = torch.Generator().manual_seed(setup.seed)
        start = torch.randn(config.queue, config.projection, generator=self.generator)
        self.register_buffer("queue", normalize(start, dim=1))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.long))

        self.new_keys: list[tuple[Tensor, Tensor | None]] = []  # keys of the current step

    @torch.no_grad()
    def begin_step(self) -> None:
        """Update the momentum branch once: p_momentum <- m p_momentum + (1 - m) p, parameters only.

        It keeps its own buffers: its batch normalization has seen other images.
        """
        for average, model in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_head, self.head),
        ):
            self.update_average_(list(average.parameters()), list(model.parameters()), None)

    def remember(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """Keep keys, unit rows (N, D), for the end of the step: all, or those that are `valid`.

        Args:
            valid: (N,) bool. Their number stays on the device; a rank may have none.
        """
        self.new_keys.append((keys, valid))

    @torch.no_grad()
    def end_step(self) -> None:
        """Overwrite the oldest rows of the queue with the keys of all ranks; wraps at the end.

        Keys have the order of the global batch, however ranks and micro-batches divide it.
        """
        length = len(self.queue)
        keys = all_gather(torch.cat([part for part, _ in self.new_keys]))
        valid = [part for _, part in self.new_keys if part is not None]
        count: int | Tensor = len(keys)
        offsets = torch.arange(min(len(keys), length), device=keys.device)
        rows = (self.queue_next + offsets) % length
        if valid:
            keys, count = replace_first_rows(self.queue[rows], keys, all_gather(torch.cat(valid)))
        self.queue[rows] = keys
        self.queue_next.add_(count).remainder_(length)
        self.new_keys.clear()

    def exported(self) -> nn.Module:
        return self.encoder


@contextmanager
def share_casts(*modules: nn.Module) -> Iterator[None]:
    """Let several forward passes without gradient share the weights that autocast has cast.

    Autocast keeps the cast of a weight, until it ends, only if the weight requires a gradient.
    """
    weights = [weight for module in modules for weight in module.parameters()]
    with torch.no_grad():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)


def replace_first_rows(rows: Tensor, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return `rows` with its first ones replaced by valid keys, and their number, on the device.

    Args:
        rows: (L, D), oldest first, at most as many as `keys`.
        keys: (N, D).
        valid: (N,) bool.

    Returns:
        (L, D): the valid keys in their order, the last L if there are more, then the remaining
        `rows`; and the number of replaced rows, () int64.
    """
    total, position = valid.sum(), torch.arange(len(rows), device=rows.device)
    valid_first = (~valid).byte().argsort(stable=True)
    chosen = valid_first[position + (total - len(rows)).clamp(min=0)]
    replaced = torch.where((position < total)[:, None], keys[chosen], rows)
    return replaced, total.clamp(max=len(rows))
