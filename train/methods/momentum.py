"""What MoCo v2 and MaskCo share: a momentum branch, and a queue of the keys that it made."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import get_ema_multi_avg_fn

from schemas import UserError
from train.distributed import all_gather
from train.encoders import build_encoder
from train.methods.method import Method, MethodConfig, Setup, projector


@dataclass(frozen=True, kw_only=True)
class MomentumConfig(MethodConfig):
    """Numbers of MoCo v2 (facebookresearch/moco)."""

    queue: int = 65_536
    """Keys that are remembered as negatives; at least the global batch, any number."""
    ema_momentum: float = 0.999
    """Share of its own weights that the momentum branch keeps at each step, 0 to 1."""
    temperature: float = 0.2
    """tau: similarities are divided by it."""
    projection: int = 128
    """Width of the projected embedding."""
    hidden: int | None = None
    """Width of the head's hidden layer; that of the encoder's features when not given."""


class MomentumMethod(Method):
    """`forward` has its keys remembered; the end of the step queues them.

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
                "must all enter it; use a longer --queue or a smaller --batch-size"
            )
        self.encoder, self.width = build_encoder(setup.encoder, setup.stem)
        self.head = projector(self.width, config.hidden, config.projection)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.move_average = get_ema_multi_avg_fn(config.ema_momentum)

        # Drawn from `seed` alone, so equal on all ranks whatever was drawn before.
        self.generator = torch.Generator().manual_seed(setup.seed)
        start = torch.randn(config.queue, config.projection, generator=self.generator)
        self.register_buffer("queue", normalize(start, dim=1))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.long))

        self.new_keys: list[tuple[Tensor, Tensor | None]] = []  # of the step under way

    @torch.no_grad()
    def begin_step(self) -> None:
        """p_momentum <- m p_momentum + (1 - m) p; parameters only, once a step.

        Buffers stay the momentum branch's own: batch normalisation in it has seen other images.
        """
        for average, model in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_head, self.head),
        ):
            self.move_average(list(average.parameters()), list(model.parameters()), None)

    def remember(self, keys: Tensor, valid: Tensor | None = None) -> None:
        """Keep keys for the end of the step: unit rows (N, D), all or those that are `valid`.

        Args:
            valid: (N,) bool. How many there are stays on the device; a rank may have none.
        """
        self.new_keys.append((keys, valid))

    @torch.no_grad()
    def end_step(self) -> None:
        """Write the keys of all ranks over the oldest ones; wraps wherever the end falls."""
        length = len(self.queue)
        for part, part_valid in self.new_keys:
            keys = all_gather(part)
            count: int | Tensor = len(keys)
            places = torch.arange(min(len(keys), length), device=keys.device)
            rows = (self.queue_next + places) % length
            if part_valid is not None:
                keys, count = renewed(self.queue[rows], keys, all_gather(part_valid))
            self.queue[rows] = keys
            self.queue_next.add_(count).remainder_(length)
        self.new_keys.clear()

    def exported(self) -> nn.Module:
        return self.encoder


def renewed(rows: Tensor, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with valid keys in place of the first of them; the host never learns how many.

    Args:
        rows: (L, D), oldest first, as many as `keys` at most.
        keys: (N, D).
        valid: (N,) bool.

    Returns:
        (L, D): the valid keys in their order, the last L where there are more, then `rows` as they
        were; and how many were replaced, () int64.
    """
    found, place = valid.sum(), torch.arange(len(rows), device=rows.device)
    valid_first = (~valid).byte().argsort(stable=True)
    chosen = valid_first[place + (found - len(rows)).clamp(min=0)]
    return torch.where((place < found)[:, None], keys[chosen], rows), found.clamp(max=len(rows))
