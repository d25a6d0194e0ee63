"""Spectral residual saliency: no weights, runs anywhere.

X. Hou and L. Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007: what of an
image's log amplitude spectrum stands out from its own local average is, back in the image, where
something unexpected is.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from precompute.estimators.maps import squash
from precompute.estimators.options import SpectralOptions

# Luma of ITU-R BT.601, as Pillow's and MATLAB's conversion to gray
LUMA = torch.tensor([0.299, 0.587, 0.114])
# Of the amplitude, in gray levels summed over the picture: ours. Rounding a picture to 8 bits alone
# gives each frequency about 18; a flat one has nothing but its mean, and log 0 has no average.
FLOOR = 1.0


class SpectralEstimator:
    """See `Estimator`. Runs on the CPU: 64 x 64 pixels are little work."""

    weights_sha256 = None
    device = "cpu"

    def __init__(self, options: SpectralOptions):
        self.options = options
        self.side = options.side

    def __call__(self, images: Any) -> np.ndarray:
        options = self.options
        gray = squash(images, options.size).float() @ LUMA  # (N, size, size)
        return saliency(gray, options.average, options.sigma, options.side).numpy()


def saliency(gray: torch.Tensor, average: int, sigma: float, side: int) -> torch.Tensor:
    """(N, S, S) gray values -> (N, side, side) maps."""
    spectrum = torch.fft.fft2(gray)
    log_amplitude = torch.log(spectrum.abs().clamp_min(FLOOR))
    padded = F.pad(log_amplitude[:, None], [average // 2] * 4, mode="replicate")
    residual = log_amplitude - F.avg_pool2d(padded, average, stride=1)[:, 0]
    maps = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs() ** 2
    smooth = blur(maps, sigma)
    return F.interpolate(smooth[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]


def blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian out to four sigma, the border repeated."""
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]
