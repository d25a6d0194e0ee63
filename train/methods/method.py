"""The interface between the trainer and a method, and what several methods share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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
variant): a third. It compares the weight in the denominator of a hard negative as similar as its
key with the weight of all other negatives at similarity 0."""
FAR = 4.0
"""Factor above or below PUBLISHED_SHARE at which the user is warned (our choice; NNS's queue of
16,384 is at 4)."""
COLLAPSED = 0.99
"""Mean similarity of different images above which a run has collapsed (our choice: collapsed runs
are above 0.999, runs that learn begin below 0.96 and end below 0.3)."""
HEAD_STD = 0.01
"""Standard deviation of a normalized head's initial weights (google-research/simclr)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Inputs for building a method, in addition to its own options."""

    encoder: str
    """Name of the encoder, as `train.encoders.build_encoder` takes it."""
    stem: Stem = "imagenet"
    """First layers of the encoder."""
    sync_bn: bool = False
    """Batch statistics are computed over all ranks; the trainer converts the layers."""
    batch_size: int
    """Images per step over all ranks."""
    grad_accum_steps: int = 1
    """Number of micro-batches of a step, processed one after the other."""
    classes: int = 0
    """Number of classes; 0 if the images have no labels."""
    count_unlabeled: Callable[[], int] = lambda: 0
    """Counts the images without a label, see `unlabeled`."""
    crop_size: int = 224
    """Side of a view in pixels."""
    seed: int = 0
    """Random seed for what a method draws itself. Weights come from torch's global generator."""

    @property
    def unlabeled(self) -> int:
        """Number of images without a label.

        To count them, all labels are read, from a dataset of over 10^8 images the table of each
        shard. So only a method that needs labels should ask.
        """
        return self.count_unlabeled()


@dataclass(frozen=True)
class OptimizationGroup:
    """Weights that one loss updates. Most methods have one group; adversaries take turns."""

    module: nn.Module
    """`module(batch)` returns a dict of scalars, one of them `loss`; its parameters are updated."""
    lr_scale: float = 1.0
    """Factor on the learning rate of the run."""
    prefix: str = ""
    """Prefix of the names of its scalars in the log."""
    has_unused: bool = False
    """The loss does not depend on some of the weights; these stay as they are."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig(ABC):
    """A method's own options; each needs a default if the command line is to set them."""

    name: ClassVar[str]
    """Name of the method in checkpoints, encoder files and tables."""
    epoch_name: ClassVar[str] = "epoch"
    """Name of the trainer's epochs on the terminal."""

    free: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ when a run resumes, for example the path of a file whose digest is an
    option too."""
    depends_on_micro_batches: ClassVar[bool] = True
    """True if splitting a batch into micro-batches (--grad-accum-steps) changes more than its batch
    statistics; if False, their number may change when a run resumes."""

    @abstractmethod
    def build(self, setup: Setup) -> "Method":
        """Build the method. Raise UserError if the options and the setup do not fit together."""

    def check(self, recipe: Recipe) -> None:  # noqa: B027 - most recipes suit a method
        """Refuse a recipe whose views make no sense for the method, before anything is built.

        Raises:
            UserError: names the recipe, or the option, to use instead.
        """

    def describe_images(self) -> str | None:
        """Describe the images in a few words; None if they are the views of a recipe."""
        return None

    def notes(self, recipe: Recipe, batch_size: int) -> list[str]:
        """Return notes on these options with this recipe, one line each.

        Args:
            batch_size: number of images, over all ranks, whose embeddings are compared: those of a
                step or of one of its micro-batches.
        """
        return []


class Method(nn.Module, ABC):
    """The modules and the loss of one way to pretrain an encoder.

    Everything that a method remembers between steps is in its parameters, buffers and extra state,
    so its state_dict alone resumes it. Parameters that require a gradient are trained.

    A step is `begin_step()`; then, for each optimization group, its `forward` on every
    micro-batch of the step and an update of its weights; then `end_step()`.
    """

    file: ClassVar[str] = "encoder.safetensors"
    """File of the exported module in the run's folder."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Compute the loss of one micro-batch of this rank.

        `batch` comes from pipeline.MaskedViews; the docstring of a method names the fields that it
        reads. Returns scalars: `loss`, with gradient, and others to be logged.
        """

    @abstractmethod
    def exported(self) -> nn.Module:
        """Return the module that is the result of pretraining, usually the encoder."""

    def optimization_groups(self) -> list[OptimizationGroup]:
        """Return the groups that a step updates, in this order, each with its own optimizer."""
        return [OptimizationGroup(self)]

    def begin_step(self) -> None:
        """Prepare a step; called before its first micro-batch. Collectives are allowed."""

    def end_step(self) -> None:
        """Finish a step; called after all weights were updated. Collectives are allowed."""

    def warnings(self, scalars: Mapping[str, float]) -> list[str]:
        """Return what is wrong with a run whose last step logged these scalars, one line each."""
        return []

    def shown(self, batch: Any) -> dict[str, Tensor]:
        """Return images to show with the views: name -> (N, 1 or 3, H, W) in 0 .. 1."""
        return {}

    def sheet(self, batch: Any, recipe: Recipe) -> Image.Image | None:
        """Return a contact sheet of the batch, or None."""
        return draw_batch_sheet(batch, recipe, self.shown(batch))

    def notes(self, samples: int) -> list[str]:
        """Return notes on these settings with `samples` images, one line each."""
        return []


def require_keys(config: MethodConfig, recipe: Recipe) -> None:
    """Raise UserError if the recipe makes only a query."""
    if not recipe.pair:
        raise UserError(f"method {config.name}: the recipe makes no keys; take --recipe.pair")


def compute_balanced_rho(temperature: float, negatives: int) -> float:
    """Return tau ln(negatives / 3), which weights hard negatives as in the published setting."""
    return temperature * math.log(negatives / 3)


def note_hard_negative_weight(
    rho: float, temperature: float, negatives: int, where: str, recipe: Recipe
) -> list[str]:
    """Return a note if hard negatives weigh far more or less than in the published setting.

    Args:
        negatives: number of other negatives per query.
        where: description of these negatives.
    """
    if not recipe.hard_negatives:
        return []
    exponent = rho / temperature  # exp(exponent) may overflow a float
    log_ratio = exponent - math.log(negatives) - math.log(PUBLISHED_SHARE)
    if abs(log_ratio) <= math.log(FAR) + 1e-6:
        return []
    share = math.exp(min(exponent - math.log(negatives), 700.0))
    return [
        f"a hard negative as similar as its key weighs exp(rho / tau) = exp({exponent:.3g}), "
        f"{format_number(share)} times {where} of {negatives:,}, where the published setting has "
        f"{PUBLISHED_SHARE:.2g}; --rho {compute_balanced_rho(temperature, negatives):.3g} gives "
        "the published ratio (docs/results.md compares both)"
    ]


def warn_of_collapse(similarity: float) -> list[str]:
    """Return a warning if the embeddings of different images have this mean similarity."""
    if similarity <= COLLAPSED:
        return []
    return [
        "collapsed so far: all images have nearly the same embedding; a warm-up "
        "(--warmup-epochs 2) or a lower --lr can prevent it (docs/results.md)"
    ]


def format_number(value: float) -> str:
    """Return a number with two digits, and without an exponent if it is below a million."""
    return f"{float(f'{value:.2g}'):,.10g}" if value < 1e6 else f"{value:.2g}"


def build_projector(
    width: int, hidden: int | None, out: int, *, layers: int = 2, norm: bool = False
) -> nn.Sequential:
    """Build a projection head: linear layers with a ReLU between them.

    Args:
        width: number of input features.
        hidden: width of the hidden layers; `width` if None.
        out: width of the embedding.
        layers: number of linear layers; 2 is the head of MoCo v2 and of SimCLR's paper.
        norm: put batch normalization after each layer instead of a bias, the last one without an
            offset, and draw weights with standard deviation 0.01 (google-research/simclr,
            model_util.py).

    Raises:
        UserError: `layers` is below 1.
    """
    if layers < 1:
        raise UserError(f"--head-layers {layers}: must be at least 1")
    hidden = width if hidden is None else hidden
    modules: list[nn.Module] = []
    for number in range(layers):
        is_last = number == layers - 1
        outputs = out if is_last else hidden
        linear = nn.Linear(hidden if number else width, outputs, bias=not norm)
        modules.append(linear)
        if norm:
            nn.init.normal_(linear.weight, std=HEAD_STD)
            normalization = nn.BatchNorm1d(linear.out_features)
            normalization.bias.requires_grad_(not is_last)  # that of the last layer stays at 0
            modules.append(normalization)
        if not is_last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
