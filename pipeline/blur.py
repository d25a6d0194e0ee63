"""Gaussian blur and high-pass of a batch of images.

The border is reflected without repeating the edge; kernels are truncated at a radius and sum to
one, as in torchvision's GaussianBlur, so blurring commutes with normalization. `pipeline.fused`
has the same blurs in a form that a compiler can fuse.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.devices import to_device
from pipeline.recipes import SOFT_BLUR_SIGMAS, Recipe


def build_gaussian_kernel(sigma: Tensor, radius: Tensor) -> Tensor:
    """Return the weights of Gaussians, each truncated at its own radius.

    Args:
        sigma: (N,) in pixels. radius: (N,) int64, pixels on either side.

    Returns:
        (N, 2 max(radius) + 1) float32; zero beyond each Gaussian's own radius.
    """
    widest = int(radius.max())
    offset = torch.arange(-widest, widest + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (offset / sigma.double().unsqueeze(1)) ** 2)
    weight *= offset.abs() <= radius.unsqueeze(1)
    return (weight / weight.sum(1, keepdim=True)).float()


def build_soft_blur_kernel(sigma: Tensor) -> Tensor:
    """Return the kernels of the photometric blur: Gaussians truncated at three sigma.

    Args:
        sigma: (N,) in pixels, above 0.
    """
    return build_gaussian_kernel(sigma, (SOFT_BLUR_SIGMAS * sigma).ceil().long())


def build_shared_kernel(taps: int, sigma: float) -> Tensor:
    """Return the (1, taps) kernel of a blur that is the same for all images."""
    return build_gaussian_kernel(torch.tensor([sigma]), torch.tensor([taps // 2]))


def blur_on_cpu(image: np.ndarray, radius: int, sigma: float) -> np.ndarray:
    """Blur one image with OpenCV, which takes a third of the time of PyTorch's convolutions.

    Args:
        image: (H, W, C) float32; H and W exceed the radius.
    """
    taps = 2 * radius + 1
    return cv2.GaussianBlur(image, (taps, taps), sigma, borderType=cv2.BORDER_REFLECT_101)


def blur_by_matrix(image: Tensor, kernel: Tensor) -> Tensor:
    """Blur on a GPU without a compiler: one product with a banded matrix per axis.

    One pass per tap would be limited by memory bandwidth. No matrix is copied for the channels:
    rows take one product for all channels, columns one product per channel.

    Args:
        image: (N, C, H, W) float32; H and W exceed the radius.
        kernel: (N or 1, 2 radius + 1) float32, symmetric, on the host: one kernel per image, or
            one for all.
    """
    kernel = to_device(kernel, image.device)
    rows = image.flatten(1, 2) @ build_banded_matrix(kernel, image.shape[3]).mT
    rows = rows.view(image.shape)
    matrix = build_banded_matrix(kernel, image.shape[2]).expand(len(image), -1, -1)
    blurred = torch.empty_like(rows)
    for channel in range(image.shape[1]):
        torch.bmm(matrix, rows[:, channel], out=blurred[:, channel])
    return blurred


def build_banded_matrix(kernel: Tensor, side: int) -> Tensor:
    """Return the (N, side, side) matrices that blur along an axis of length `side`."""
    radius, device = kernel.shape[1] // 2, kernel.device
    position = torch.arange(side, device=device).unsqueeze(1)
    source = reflect(position + torch.arange(-radius, radius + 1, device=device), side)
    size = len(kernel)
    matrix = torch.zeros(size, side, side, device=device)
    return matrix.scatter_add_(
        2, source.expand(size, -1, -1), kernel.unsqueeze(1).expand(-1, side, -1).contiguous()
    )


def reflect(position: Tensor, side: int) -> Tensor:
    """Map a position beyond the border to the pixel, 0 .. side - 1, that is mirrored there."""
    return side - 1 - (side - 1 - position.abs()).abs()


def apply_shared_blur(image: Tensor, taps: int, sigma: float) -> Tensor:
    """Blur (N, C, H, W) images with the same Gaussian, whose kernel is `taps` pixels wide."""
    if image.device.type != "cpu":
        return blur_by_matrix(image, build_shared_kernel(taps, sigma))
    images = np.ascontiguousarray(image.permute(0, 2, 3, 1).numpy())
    blurred = np.stack([blur_on_cpu(single, taps // 2, sigma) for single in images])
    return torch.from_numpy(blurred).permute(0, 3, 1, 2)


def apply_high_pass(image: Tensor, recipe: Recipe) -> Tensor:
    """Return x - GaussianBlur(x), (N, 3, H, W) float32 (loader.py of the released code)."""
    return image - apply_shared_blur(image, recipe.high_pass_kernel, recipe.high_pass_sigma)
