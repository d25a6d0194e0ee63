"""Options of each estimator, and the registry of names.

Each `build` imports its estimator when it is called, because torch and torchvision take seconds to
import and `--help` needs neither.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from precompute.estimators.base import Estimator
from schemas.cli import make_absolute
from schemas.errors import UserError


@dataclass(frozen=True)
class EstimatorOptions:
    """Options of one estimator, pickled to the workers and written to the dataset's card."""

    name: ClassVar[str]

    def build(self, device: str = "auto") -> Estimator:
        """Build the estimator and load its weights. Raises UserError.

        Args:
            device: `auto` for the GPU if there is one; `cpu` to inspect the weights and the map's
                side without creating a context on a GPU.
        """
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Return the name and all options, for the card and for comparing settings on resume."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class ScdaOptions(EstimatorOptions):
    """Sum over channels of a CNN's last convolutional map, computed on overlapping windows."""

    name: ClassVar[str] = "scda"

    backbone: str = "resnet50"
    """Name of a torchvision classification CNN, or of a timm network (timm:convnext_tiny)."""
    weights: str = "DEFAULT"
    """Weights of the backbone: a torchvision name (downloaded by torchvision), `random`, the folder
    of a training run, or a file with a state_dict or a checkpoint (MoCo's .pth.tar, Lightning's
    .ckpt, safetensors), in which parameter names may have a prefix."""
    layer: str = ""
    """Layer whose output is summed, by its name in torch.fx (layer3, features.8 ...); by default
    the last convolutional map."""
    size: int = 224
    """Side of the backbone's input in pixels, to which every window is resized; the default is the
    side of the training views."""
    areas: tuple[float, ...] = (1.0, 0.45)
    """Areas of the windows as fractions of the image; 1 is the whole image. Overlapping windows of
    each area cover the image; their maps are pasted back, z-scored and averaged over the areas.
    docs/saliency.md compares the choices with the online map."""
    side: int = 28
    """Number of cells along one side of the stored map."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the backbone's forward pass; auto is bf16 on a device that has instructions for
    it, and fp32 on others."""
    compile: bool = False
    """Compile the backbone with torch.compile, which adds minutes to the start of every worker."""

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
    """Spectral residual of Hou & Zhang 2007 at 64 x 64 pixels; needs no weights and no labels."""

    name: ClassVar[str] = "spectral"

    size: int = 64
    """Side of the input in pixels (Hou & Zhang: 64)."""
    average: int = 3
    """Side of the box filter over the log amplitude, in frequency bins (Hou & Zhang: 3)."""
    sigma: float = 2.5
    """Standard deviation of the Gaussian blur of the map, in input pixels (as in the paper's MATLAB
    listing, from general knowledge; not looked up)."""
    side: int = 28
    """Number of cells along one side of the stored map."""

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
    """Custom function: N images of (height, width, 3) uint8 RGB in, (N, side, side) maps out."""

    name: ClassVar[str] = "function"

    function: str = ""
    """Function that returns the maps, as `FILE.py:function` or `module:function`."""

    def __post_init__(self) -> None:
        # an absolute path, because workers have another current folder
        object.__setattr__(self, "function", make_absolute(self.function))

    def parameters(self) -> dict[str, Any]:
        """Return the name and the function, with the file's name only.

        The folder does not matter for resuming; the content does, by `weights_sha256`.
        """
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
