"""Spectral residual saliency, which needs no weights and runs on any machine.

X. Hou and L. Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR 2007: the difference
between an image's log amplitude spectrum and the spectrum's local average, transformed back to
pixels, is large where the image is unexpected.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from precompute.estimators.maps import squash
from precompute.estimators.options import SpectralOptions

# Luma of ITU-R BT.601, which Pillow and MATLAB use for the conversion to gray
LUMA = torch.tensor([0.299, 0.587, 0.114])
# Lower limit of the amplitude, in gray levels summed over the picture (our choice). Rounding to 8
# bits alone gives each frequency about 18. A flat picture has only its mean, and the log of a zero
# amplitude would make the local averages infinite.
FLOOR = 1.0


class SpectralEstimator:
    """Estimator of spectral residual maps; see `Estimator`.

    Runs on the CPU, because 64 x 64 pixels are little work.
    """

    weights_sha256 = None
    device = "cpu"
    network_on_gpu = False

    def __init__(self, options: SpectralOptions):
        self.options = options
        self.side = options.side

    def __call__(self, images: Any) -> np.ndarray:
        options = self.options
        gray = squash(images, options.size).float() @ LUMA  # (N, size, size)
        return compute_saliency(gray, options.average, options.sigma, options.side).numpy()


def compute_saliency(gray: torch.Tensor, average: int, sigma: float, side: int) -> torch.Tensor:
    """Compute (N, side, side) maps from (N, S, S) gray values."""
    spectrum = torch.fft.fft2(gray)
    log_amplitude = torch.log(spectrum.abs().clamp_min(FLOOR))
    padded = F.pad(log_amplitude[:, None], [average // 2] * 4, mode="replicate")
    residual = log_amplitude - F.avg_pool2d(padded, average, stride=1)[:, 0]
    maps = torch.fft.ifft2(torch.polar(residual.exp(), spectrum.angle())).abs() ** 2
    smooth = blur(maps, sigma)
    return F.interpolate(smooth[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]


def blur(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur maps with a Gaussian of radius four sigma, repeating the border."""
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]
