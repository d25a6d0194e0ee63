"""What the training loop asks of a method, and no more."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from pipeline import Recipe
from pipeline.preview import draw_batch_sheet
from schemas import UserError
from train.encoders import Stem

PUBLISHED_SHARE = math.exp(2 / 0.2) / 65_536
"""exp(rho / tau) over the number of negatives in the published setting (README of the masked
variant): a third. That is the weight in the denominator of a hard negative as similar as its key,
over that of all others at similarity 0."""
FAR = 4.0
"""Times more or less than that from which a run is told (ours; NNS's queue of 16,384 is at 4)."""
HEAD_STD = 0.01
"""Standard deviation of a normalized head's initial weights (google-research/simclr)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a method is built for, beyond its own options."""

    encoder: str
    """A name of `train.encoders.ENCODERS`."""
    stem: Stem = "imagenet"
    """The encoder's first layers."""
    sync_bn: bool = False
    """Whether batch normalisation is over the images of all ranks; the loop converts the layers."""
    batch_size: int
    """Images of a step, over all ranks."""
    accumulate: int = 1
    """Parts that a step's images come in, one after the other."""
    classes: int = 0
    """Of the labels; 0 where the images have none."""
    unlabelled: int = 0
    """Images without a label."""
    crop_size: int = 224
    """Side of a view in pixels."""
    seed: int = 0
    """Of whatever a method draws by itself. Weights come from torch's global generator."""


@dataclass(frozen=True)
class Player:
    """Weights that move by one loss. Most methods are one player; opponents take turns."""

    module: nn.Module
    """`module(batch)` is a dict of scalars, one of them `loss`; its parameters are the player's."""
    rate: float = 1.0
    """Its learning rate over the training's."""
    prefix: str = ""
    """Before the names of its scalars in the log."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """A method's own options, each with a default where the command line is to make one."""

    name: ClassVar[str]
    """What checkpoints, encoders and tables call the method."""

    @abstractmethod
    def build(self, setup: Setup) -> "Method":
        """Raises UserError when the options and the setup do not fit each other."""

    def check(self, recipe: Recipe) -> None:  # noqa: B027 - most recipes suit a method
        """Refuse a recipe whose views make no sense for the method, before anything is built.

        Raises:
            UserError: names the recipe, or the option, to take instead.
        """

    def notes(self, recipe: Recipe, batch_size: int) -> list[str]:
        """Return what a person should know of these options with this recipe, one line each.

        Args:
            batch_size: images, over all ranks, whose embeddings meet: a step's or one part's.
        """
        return []


class Method(nn.Module, ABC):
    """The modules and the loss of one way to pretrain an encoder.

    All that a method must remember between steps lies in its parameters, buffers and extra state,
    so that its state_dict alone resumes it. Trainable is whatever requires a gradient.

    A step is `begin_step()`; then for each player its `forward` on every part of the step's images
    and an update of its weights; then `end_step()`.
    """

    file: ClassVar[str] = "encoder.safetensors"
    """Where the run's folder has what is exported."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """The loss of one part of this rank's images.

        `batch` is what pipeline.MaskedViews yields; a method names in its docstring the fields
        that it reads. Returns scalars: `loss`, with gradient, and others to be logged.
        """

    @abstractmethod
    def exported(self) -> nn.Module:
        """The encoder that the training is for."""

    def players(self) -> list[Player]:
        """Who moves in a step, in this order, each with an optimiser of its own."""
        return [Player(self)]

    def begin_step(self) -> None:
        """Called once a step, before the first part; collectives are allowed."""

    def end_step(self) -> None:
        """Called once a step, when all weights have moved; collectives are allowed."""

    def shown(self, batch: Any) -> dict[str, Tensor]:
        """Pictures beside the views of a batch: name -> (N, 1 or 3, H, W) in 0 .. 1."""
        return {}

    def sheet(self, batch: Any, recipe: Recipe) -> Image.Image | None:
        """A picture of what is fed, for a person to look at."""
        return draw_batch_sheet(batch, recipe, self.shown(batch))

    def notes(self, samples: int) -> list[str]:
        """What a person should know about these settings on `samples` images; one line each."""
        return []


def needs_keys(config: MethodConfig, recipe: Recipe) -> None:
    """Raises UserError where the recipe gives a query alone."""
    if not recipe.pair:
        raise UserError(f"method {config.name}: the recipe makes no keys; take --recipe.pair")


def balanced_rho(temperature: float, negatives: int) -> float:
    """Return tau ln(negatives / 3): hard negatives then weigh as in the published setting."""
    return temperature * math.log(negatives / 3)


def hard_negative_notes(
    rho: float, temperature: float, negatives: int, where: str, recipe: Recipe
) -> list[str]:
    """Say so where hard negatives weigh far more or less than in the published setting.

    Args:
        negatives: how many others each query meets. where: what they are, in words.
    """
    if not recipe.hard_negatives:
        return []
    exponent = rho / temperature  # its exp may be more than a float holds
    times = exponent - math.log(negatives) - math.log(PUBLISHED_SHARE)
    if abs(times) <= math.log(FAR) + 1e-6:
        return []
    share = math.exp(min(exponent - math.log(negatives), 700.0))
    return [
        f"a hard negative as similar as its key weighs exp(rho / tau) = exp({exponent:.3g}), "
        f"{share:.2g} times {where} of {negatives:,}, where the published setting has "
        f"{PUBLISHED_SHARE:.2g}; --rho {balanced_rho(temperature, negatives):.3g} would be as "
        "published"
    ]


def projector(
    width: int, hidden: int | None, out: int, *, layers: int = 2, norm: bool = False
) -> nn.Sequential:
    """Build a projection head: linear layers with a ReLU between them.

    Args:
        width: of the features.
        hidden: width of the layers between; that of the features when None.
        out: width of the embedding.
        layers: linear layers; 2 is the head of MoCo v2 and of SimCLR's paper.
        norm: batch normalization behind each layer in place of its bias, the last one without an
            offset, and weights of standard deviation 0.01 (google-research/simclr, model_util.py).

    Raises:
        UserError: no layer.
    """
    if layers < 1:
        raise UserError(f"--head-layers {layers}: must be at least 1")
    hidden = width if hidden is None else hidden
    modules: list[nn.Module] = []
    for number in range(layers):
        last = number == layers - 1
        linear = nn.Linear(hidden if number else width, out if last else hidden, bias=not norm)
        modules.append(linear)
        if norm:
            nn.init.normal_(linear.weight, std=HEAD_STD)
            normalization = nn.BatchNorm1d(linear.out_features)
            normalization.bias.requires_grad_(not last)  # the last one's stays at 0
            modules.append(normalization)
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
