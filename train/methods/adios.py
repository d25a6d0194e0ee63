"""ADIOS: masks that are learned against the encoder (Shi et al., ICML 2022; YugeTen/adios).

    b  query view, plain --> occlusion network --> masks m_1 .. m_N, a partition of the image
    b_n = b (1 - m_n)    masked pixels become 0, the data's mean colour
    a  key view, plain

    encoder's turn     min  sum_n L(b_n, a)                                       masks as they are
    occlusion's turn   max  sum_n [ L(b_n, a) - lambda penalty(m_n) ] + lambda_e E   encoder fixed

    penalty = mean over images of 1 / (sin(pi s_n) + 1e-10),   s_n the share of the image in m_n
    E = sum over images and masks of p_n log p_n,   p = softmax(s)

E is a sum over the images of a step, as the released code has it, not a mean: its weight grows with
the batch beside the other terms, and a published lambda_e belongs to the published batch. The sum
is over the images of all ranks and parts, so neither changes it.

L is SimCLR's or MoCo v2's loss; that of MoCo v2 is ours, the released code has none. In ADIOS-s
(`single`) each image gets one of its masks, drawn uniformly, in place of the sum; the penalty is
still over all of them. The released code also trains a linear classifier on the labels beside it;
here `--knn.data` watches the encoder. Its batch statistics move in both turns; here the occlusion
network's turn leaves the encoder as it is, its statistics too. Its warm-up starts at a learning
rate of 0.003 for both networks; ours starts near 0, as everywhere in this trainer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline import Recipe
from pipeline.devices import to_device
from schemas import UserError
from train.distributed import rank, world_size
from train.methods.method import Method, MethodConfig, Player, Setup, needs_keys
from train.methods.moco import MoCo, MoCoConfig
from train.methods.occlusion import Norm, OcclusionNet
from train.methods.simclr import SimCLR, SimCLRConfig

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class ADIOSConfig(MethodConfig):
    """Numbers of the released run SimCLR + ADIOS-s on ImageNet-100 (bash_files/training)."""

    name: ClassVar[str] = "adios"

    objective: Literal["simclr", "moco"] = "simclr"
    """Which loss the two play for; moco is ours."""
    single: bool = True
    """One mask an image (ADIOS-s); otherwise all of them, one after the other (ADIOS)."""
    masks: int = 4
    """N, into which the occlusion network divides an image."""
    channels: int = 8
    """Base width of the occlusion network; a multiple of 8 with group norm."""
    norm: Norm = "group"
    """Normalization in the occlusion network; with none its convolutions have biases."""
    sparsity: float = 0.75
    """lambda: weight of the penalty on masks that have all of an image or nothing."""
    entropy: float = 0.0
    """lambda_e: weight of the negative entropy E, a sum over the batch; 0.712 is for 128 images."""
    mask_rate: float = 0.4988 / 0.1896
    """The occlusion network's learning rate over the encoder's."""
    temperature: float = 0.2
    """tau: similarities are divided by it."""
    hidden: int | None = 2048
    """Width of the head's hidden layer."""
    projection: int = 128
    """Width of the projected embedding."""
    queue: int = 65_536
    """moco: keys that are remembered."""
    ema_momentum: float = 0.999
    """moco: share of its own weights that the momentum encoder keeps at each step."""

    def check(self, recipe: Recipe) -> None:
        needs_keys(self, recipe)
        if recipe.fill != "none":  # which has no hard negatives either
            raise UserError(
                f"method adios: learns its own masks, of plain views; the recipe has masks or hard "
                f"negatives (fill {recipe.fill}); take --recipe none"
            )

    def build(self, setup: Setup) -> "ADIOS":
        return ADIOS(self, setup)


class ADIOS(Method):
    """Reads `query` and `key` of a batch, both unmasked (`--recipe none`); needs no label."""

    def __init__(self, config: ADIOSConfig, setup: Setup) -> None:
        super().__init__()
        self.config, self.batch_size = config, setup.batch_size
        shared: dict[str, Any] = dict(
            temperature=config.temperature, hidden=config.hidden, projection=config.projection
        )
        self.inner: MoCo | SimCLR
        if config.objective == "moco":
            moco = MoCoConfig(queue=config.queue, ema_momentum=config.ema_momentum, **shared)
            self.inner = moco.build(setup)
        else:
            self.inner = SimCLRConfig(**shared).build(setup)
        self.occlusion = OcclusionNet(
            setup.crop_size, masks=config.masks, channels=config.channels, norm=config.norm
        )
        self.generator = torch.Generator().manual_seed(setup.seed)

    def players(self) -> list[Player]:
        return [
            Player(EncoderTurn(self)),
            Player(OcclusionTurn(self), rate=self.config.mask_rate, prefix="mask_"),
        ]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The encoder's turn."""
        return EncoderTurn(self)(batch)

    def masked(self, batch: Any, masks: Tensor) -> Iterator[Any]:
        """The batch with its query masked: once by a mask drawn for each image, or by each in turn.

        Args:
            masks: (N, masks, H, W).
        """
        if self.config.single:
            size, count = masks.shape[:2]
            # drawn for all ranks alike, so that the generator's state is one
            drawn = torch.randint(count, (world_size(), size), generator=self.generator)
            index = to_device(drawn[rank()], masks.device)
            chosen = masks[torch.arange(size, device=masks.device), index]
            yield replace(batch, query=batch.query * (1 - chosen[:, None]), hard_negative=None)
        else:
            for mask in masks.unbind(1):
                yield replace(batch, query=batch.query * (1 - mask[:, None]), hard_negative=None)

    def begin_step(self) -> None:
        self.inner.begin_step()

    def end_step(self) -> None:
        self.inner.end_step()

    def exported(self) -> nn.Module:
        return self.inner.encoder

    @torch.no_grad()
    def shown(self, batch: Any) -> dict[str, Tensor]:
        masks = self.occlusion(batch.query)
        return {f"mask {n + 1}": mask[:, None] for n, mask in enumerate(masks.unbind(1))}

    def notes(self, samples: int) -> list[str]:
        return self.inner.notes(samples)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


class EncoderTurn(nn.Module):
    """The encoder and its head against masks that do not move."""

    def __init__(self, game: ADIOS) -> None:
        super().__init__()
        self.inner = game.inner
        self.hidden = (game,)  # in a tuple: the occlusion network's weights are not this player's

    def forward(self, batch: Any) -> dict[str, Tensor]:
        (game,) = self.hidden
        with torch.no_grad():
            masks = game.occlusion(batch.query)
        views = game.masked(batch, masks)
        found = [self.inner(next(views))]
        found += [self.inner.contrast(view) for view in views]  # the same keys: remembered once
        return summed(found)


class OcclusionTurn(nn.Module):
    """The occlusion network against an encoder that does not move."""

    def __init__(self, game: ADIOS) -> None:
        super().__init__()
        self.occlusion = game.occlusion
        self.hidden = (game,)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        (game,) = self.hidden
        masks = self.occlusion(batch.query)
        contrast = Contrast(game.inner)
        frozen = {name: value.detach() for name, value in contrast.named_parameters()}
        frozen |= {  # copies: the encoder's statistics stay
            name: value.clone() if name.endswith(STATISTICS) else value
            for name, value in contrast.named_buffers()
        }
        found = summed(
            [functional_call(contrast, frozen, (each,)) for each in game.masked(batch, masks)]
        )
        with torch.autocast(masks.device.type, enabled=False):
            penalty = sparsity_penalty(masks)
            # ranks and parts are averaged afterwards: this makes the mean of their sums a sum
            balance = negative_entropy(masks) * (game.batch_size / len(masks))
            objective = found["loss"] - game.config.sparsity * penalty
            objective = objective + game.config.entropy * balance
        return {"loss": -objective, "contrast": found["loss"].detach(), "penalty": penalty.detach()}


class Contrast(nn.Module):
    """A method's loss as a module, without what it remembers between steps."""

    def __init__(self, inner: MoCo | SimCLR) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.inner.contrast(batch)


def sparsity_penalty(masks: Tensor) -> Tensor:
    """sum_n mean_i 1 / (sin(pi s_ni) + 1e-10) of masks (images, N, H, W); N at least."""
    share = masks.mean(dim=(2, 3))  # (images, N)
    # the same sine, but in float32 that of pi is below 0: all of an image would be a reward
    nearest = torch.minimum(share, 1 - share).clamp(min=0)
    return (1 / (torch.sin(math.pi * nearest) + 1e-10)).mean(dim=0).sum()


def negative_entropy(masks: Tensor) -> Tensor:
    """Return E: the sum over images and masks of p log p, with p = softmax(s) over the masks."""
    logs = masks.mean(dim=(2, 3)).log_softmax(dim=1)
    return (logs.exp() * logs).sum()


def summed(scalars: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Losses as their sum, everything else as its mean."""
    total = {name: torch.stack([each[name] for each in scalars]) for name in scalars[0]}
    return {
        name: values.sum() if name == "loss" else values.mean() for name, values in total.items()
    }
