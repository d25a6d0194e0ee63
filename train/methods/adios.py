"""ADIOS: masks that are learned against the encoder (Shi et al., ICML 2022; YugeTen/adios).

    b  query view, unmasked --> occlusion network --> masks m_1 .. m_N, a partition of the image
    b_n = b (1 - m_n)    masked pixels become 0, the mean color of the data
    a  key view, unmasked

    encoder step     min  sum_n L(b_n, a)                                          masks fixed
    occlusion step   max  sum_n [ L(b_n, a) - lambda penalty(m_n) ] + lambda_e E   encoder fixed

    penalty = mean over images of 1 / (sin(pi s_n) + 1e-10),   s_n the share of the image in m_n
    E = sum over images and masks of p_n log p_n,   p = softmax(s)

E is a sum over the images of a step, as in the released code, not a mean: relative to the other
terms it grows with the batch, so a published lambda_e belongs to the published batch. The sum
covers the images of all ranks and micro-batches, so their numbers do not change it.

L is the loss of SimCLR or of MoCo v2 (the latter is ours, the released code has only SimCLR). In
ADIOS-s (`single`) each image gets one of its masks, drawn uniformly, instead of the sum; the
penalty still covers all masks.

Differences from the released code: it also trains a linear classifier on the labels, here
`--knn.data` monitors the encoder; its batch statistics change in both steps, here the occlusion
step leaves the encoder and its statistics unchanged; its warm-up starts at a learning rate of 0.003
for both networks, here it starts near 0, as everywhere in this trainer.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline import Recipe
from pipeline.devices import to_device
from schemas import UserError
from train.distributed import rank, world_size
from train.methods.method import Method, MethodConfig, OptimizationGroup, Setup, require_keys
from train.methods.moco import MoCo, MoCoConfig
from train.methods.occlusion import Norm, OcclusionNet
from train.methods.simclr import SimCLR, SimCLRConfig

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class ADIOSConfig(MethodConfig):
    """Options with the numbers of the released run SimCLR + ADIOS-s on ImageNet-100.

    Source: bash_files/training.
    """

    name: ClassVar[str] = "adios"

    objective: Literal["simclr", "moco"] = "simclr"
    """Loss over which encoder and occlusion network compete; moco is ours."""
    single: bool = True
    """Apply one randomly drawn mask per image (ADIOS-s) instead of all in turn (ADIOS)."""
    masks: int = 4
    """N: number of masks into which the occlusion network divides an image."""
    channels: int = 8
    """Base width of the occlusion network; a multiple of 8 with group norm."""
    norm: Norm = "group"
    """Normalization in the occlusion network; with none its convolutions have biases."""
    sparsity: float = 0.75
    """lambda: weight of the penalty on masks that cover all of an image or nothing."""
    entropy: float = 0.0
    """lambda_e: weight of the negative entropy E, a sum over the batch; 0.712 is for 128 images."""
    mask_rate: float = 0.4988 / 0.1896
    """Learning rate of the occlusion network divided by that of the encoder."""
    temperature: float = 0.2
    """tau: similarities are divided by it."""
    hidden: int | None = 2048
    """Width of the head's hidden layer."""
    projection: int = 128
    """Width of the projected embedding."""
    queue: int = 65_536
    """moco: number of keys that are remembered as negatives."""
    ema_momentum: float = 0.999
    """moco: share of its own weights that the momentum encoder keeps in each step."""

    def check(self, recipe: Recipe) -> None:
        require_keys(self, recipe)
        if recipe.fill != "none":  # without a fill there are no hard negatives either
            raise UserError(
                f"method adios: learns its own masks on plain views; the recipe has masks or hard "
                f"negatives (fill {recipe.fill}); take --recipe none"
            )

    def build(self, setup: Setup) -> "ADIOS":
        return ADIOS(self, setup)


class ADIOS(Method):
    """ADIOS; reads `query` and `key`, both unmasked (`--recipe none`), needs no label."""

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

    def optimization_groups(self) -> list[OptimizationGroup]:
        return [
            OptimizationGroup(EncoderStep(self)),
            OptimizationGroup(OcclusionStep(self), lr_scale=self.config.mask_rate, prefix="mask_"),
        ]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Compute the loss of the encoder step."""
        return EncoderStep(self)(batch)

    def apply_masks(self, batch: Any, masks: Tensor) -> Iterator[Any]:
        """Yield the batch with its query masked: by one mask drawn per image, or by each in turn.

        Args:
            masks: (N, masks, H, W).
        """
        if self.config.single:
            size, count = masks.shape[:2]
            # drawn for all ranks on each rank, so that the generators stay in the same state
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

    def warnings(self, scalars: Mapping[str, float]) -> list[str]:
        return self.inner.warnings(scalars)

    def notes(self, samples: int) -> list[str]:
        return self.inner.notes(samples)

    def get_extra_state(self) -> Tensor:
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())


class EncoderStep(nn.Module):
    """Loss of the encoder and its head with the masks fixed."""

    def __init__(self, adios: ADIOS) -> None:
        super().__init__()
        self.inner = adios.inner
        self.hidden = (adios,)  # a tuple hides the occlusion network's weights from this module

    def forward(self, batch: Any) -> dict[str, Tensor]:
        (adios,) = self.hidden
        with torch.no_grad():
            masks = adios.occlusion(batch.query)
        views = adios.apply_masks(batch, masks)
        scalars = [self.inner(next(views))]
        scalars += [self.inner.contrast(view) for view in views]  # the same keys: remembered once
        return combine_scalars(scalars)


class OcclusionStep(nn.Module):
    """Loss of the occlusion network with the encoder fixed."""

    def __init__(self, adios: ADIOS) -> None:
        super().__init__()
        self.occlusion = adios.occlusion
        self.hidden = (adios,)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        (adios,) = self.hidden
        masks = self.occlusion(batch.query)
        contrast = Contrast(adios.inner)
        frozen = {name: value.detach() for name, value in contrast.named_parameters()}
        frozen |= {  # copies, so that the encoder's statistics do not change
            name: value.clone() if name.endswith(STATISTICS) else value
            for name, value in contrast.named_buffers()
        }
        views = adios.apply_masks(batch, masks)
        scalars = combine_scalars([functional_call(contrast, frozen, (view,)) for view in views])
        with torch.autocast(masks.device.type, enabled=False):
            penalty = sparsity_penalty(masks)
            # scaled, so that the later mean over ranks and micro-batches is a sum over all images
            balance = negative_entropy(masks) * (adios.batch_size / len(masks))
            objective = scalars["loss"] - adios.config.sparsity * penalty
            objective = objective + adios.config.entropy * balance
        return {
            "loss": -objective,
            "contrast": scalars["loss"].detach(),
            "penalty": penalty.detach(),
        }


class Contrast(nn.Module):
    """Wraps the loss of a method as a module that remembers nothing between steps."""

    def __init__(self, inner: MoCo | SimCLR) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.inner.contrast(batch)


def sparsity_penalty(masks: Tensor) -> Tensor:
    """Compute sum_n mean_i 1 / (sin(pi s_ni) + 1e-10) for masks (images, N, H, W); it is >= N."""
    share = masks.mean(dim=(2, 3))  # (images, N)
    # sin(pi s) = sin(pi (1 - s)), but sin(pi) is below 0 in float32, which would reward s = 1
    nearest = torch.minimum(share, 1 - share).clamp(min=0)
    return (1 / (torch.sin(math.pi * nearest) + 1e-10)).mean(dim=0).sum()


def negative_entropy(masks: Tensor) -> Tensor:
    """Compute E: the sum over images and masks of p log p, with p = softmax(s) over the masks."""
    logs = masks.mean(dim=(2, 3)).log_softmax(dim=1)
    return (logs.exp() * logs).sum()


def combine_scalars(scalars: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sum the losses and average everything else."""
    stacked = {name: torch.stack([row[name] for row in scalars]) for name in scalars[0]}
    return {
        name: values.sum() if name == "loss" else values.mean() for name, values in stacked.items()
    }
