"""Options of each estimator, and the registry of names.

Each `build` imports its estimator when it is called: torch and torchvision take seconds to import,
and a command line's `--help` needs neither.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from precompute.estimators.base import Estimator
from schemas.cli import absolute
from schemas.errors import UserError


@dataclass(frozen=True)
class EstimatorOptions:
    """Options of one estimator: pickled to the workers, and written to the card."""

    name: ClassVar[str]

    def build(self, device: str = "auto") -> Estimator:
        """Load what the estimator needs. Raises UserError.

        Args:
            device: `auto`, the GPU if there is one; or `cpu`, to look at the weights and at the
                map's side without a context on a GPU.
        """
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The name and all options, as the card and the refusal of other settings have them."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class ScdaOptions(EstimatorOptions):
    """The summed last convolutional map of a torchvision CNN, of overlapping windows."""

    name: ClassVar[str] = "scda"

    backbone: str = "resnet50"
    """A torchvision classification CNN by name, or one of timm: timm:convnext_tiny."""
    weights: str = "DEFAULT"
    """A torchvision weights name (downloaded as torchvision does), `random`, a run's folder, or any
    file of weights: a state_dict or a checkpoint (MoCo's .pth.tar, Lightning's .ckpt, safetensors)
    in which the backbone's names have some prefix."""
    layer: str = ""
    """The map to sum, as torch.fx calls it (layer3, features.8 ...); the last one by default."""
    size: int = 224
    """Side of the input in pixels, which every window is squashed to: that of the views."""
    areas: tuple[float, ...] = (1.0, 0.45)
    """Areas of the windows as shares of the image, 1 for all of it. Windows of one area cover the
    image, overlapping; their maps are pasted back, z-scored and averaged over the areas.
    docs/saliency.md has how close each choice comes to the online map."""
    side: int = 28
    """Cells on a side of the stored map."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the backbone's forward pass."""
    compile: bool = False
    """Compile the backbone by torch.compile: minutes at the start of every worker."""

    def __post_init__(self) -> None:
        check(len(self.areas) > 0, "areas", "give at least one area")
        check(all(0 < area <= 1 for area in self.areas), "areas", "must be above 0, at most 1")
        check(self.size >= 1, "size", "must be 1 pixel or more")
        check(self.side >= 1, "side", "must be 1 cell or more")

    def build(self, device: str = "auto") -> Estimator:
        from precompute.estimators.scda import ScdaEstimator

        return ScdaEstimator(self, device)


@dataclass(frozen=True)
class SpectralOptions(EstimatorOptions):
    """The spectral-residual map of Hou & Zhang 2007: no weights, no labels, 64 x 64 pixels."""

    name: ClassVar[str] = "spectral"

    size: int = 64
    """Pixels on a side of the input (Hou & Zhang: 64)."""
    average: int = 3
    """Side of the box filter over the log amplitude, in frequency bins (Hou & Zhang: 3)."""
    sigma: float = 2.5
    """Of the Gaussian over the map, in input pixels (the paper's MATLAB listing; general knowledge,
    not looked up)."""
    side: int = 28
    """Cells on a side of the stored map."""

    def __post_init__(self) -> None:
        check(self.size >= 1, "size", "must be 1 pixel or more")
        check(self.average >= 1 and self.average % 2 == 1, "average", "must be odd, 1 or more")
        check(self.sigma > 0, "sigma", "must be above 0")
        check(self.side >= 1, "side", "must be 1 cell or more")

    def build(self, device: str = "auto") -> Estimator:
        from precompute.estimators.spectral import SpectralEstimator

        return SpectralEstimator(self)


@dataclass(frozen=True)
class FunctionOptions(EstimatorOptions):
    """A function of your own: N images, (height, width, 3) uint8 RGB each -> (N, side, side)."""

    name: ClassVar[str] = "function"

    function: str = ""
    """`FILE.py:function` or `module:function`."""

    def __post_init__(self) -> None:
        # workers have another current folder
        object.__setattr__(self, "function", absolute(self.function))

    def parameters(self) -> dict[str, Any]:
        """Of a file its name alone: what is in it counts, by its sha256, and not where it lies."""
        module, _, name = self.function.rpartition(":")
        return {"name": self.name, "function": f"{module.rpartition('/')[2]}:{name}"}

    def build(self, device: str = "auto") -> Estimator:
        from precompute.estimators.function import FunctionEstimator

        return FunctionEstimator(self.function)


def check(holds: bool, option: str, rule: str) -> None:
    if not holds:
        raise UserError(f"--estimator.{option}: {rule}")


ESTIMATORS: dict[str, EstimatorOptions] = {
    options.name: options for options in (ScdaOptions(), SpectralOptions())
}
