"""Options of each estimator, and the registry of names.

Each `build` imports its estimator when it is called: torch and torchvision take seconds to import,
and a command line's `--help` needs neither.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from precompute.estimators.base import Estimator
from schemas.errors import UserError


@dataclass(frozen=True)
class EstimatorOptions:
    """Options of one estimator: pickled to the workers, and written to the card."""

    name: ClassVar[str]

    def build(self) -> Estimator:
        """Load what it needs, on the GPU if there is one. Raises UserError."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The name and all options, as the card and the refusal of other settings have them."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class ScdaOptions(EstimatorOptions):
    """The summed last convolutional map of a torchvision CNN, at several input sizes."""

    name: ClassVar[str] = "scda"

    backbone: str = "resnet50"
    """A torchvision classification CNN by name."""
    weights: str = "DEFAULT"
    """A torchvision weights name (downloaded as torchvision does), the path of a state_dict
    (.pt, .pth or .safetensors), or `random`."""
    sizes: tuple[int, ...] = (224, 448)
    """Input sides in pixels, the image squashed to each; the maps are z-scored and averaged
    (224 + 448 came closest to the online map on photos: IoU 0.80, either alone 0.78 and 0.73)."""
    side: int = 28
    """Cells on a side of the stored map."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the backbone's forward pass."""

    def __post_init__(self) -> None:
        check(len(self.sizes) > 0, "sizes", "give at least one input size")
        check(min(self.sizes) >= 1, "sizes", "must be 1 pixel or more")
        check(self.side >= 1, "side", "must be 1 cell or more")

    def build(self) -> Estimator:
        from precompute.estimators.scda import ScdaEstimator

        return ScdaEstimator(self)


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

    def build(self) -> Estimator:
        from precompute.estimators.spectral import SpectralEstimator

        return SpectralEstimator(self)


def check(holds: bool, option: str, rule: str) -> None:
    if not holds:
        raise UserError(f"--estimator.{option}: {rule}")


ESTIMATORS: dict[str, EstimatorOptions] = {
    options.name: options for options in (ScdaOptions(), SpectralOptions())
}
