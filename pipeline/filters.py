"""Gaussian blur and high-pass of a batch of images.

The border is reflected without repeating the edge and kernels are cut at a radius and sum to one,
as in torchvision's GaussianBlur. A blur's kernel sums to one, so blurring commutes with
normalisation.
"""

import torch
from torch import Tensor

from pipeline.draws import to_device
from pipeline.recipes import Recipe


def gaussian_kernel(sigma: Tensor, radius: Tensor) -> Tensor:
    """Weights of Gaussians, each cut at its own radius.

    Args:
        sigma: (N,) in pixels. radius: (N,) int64, pixels on either side.

    Returns:
        (N, 2 max(radius) + 1) float32; zero beyond an own radius.
    """
    widest = int(radius.max())
    offset = torch.arange(-widest, widest + 1, dtype=torch.float64)
    weight = torch.exp(-0.5 * (offset / sigma.double().unsqueeze(1)) ** 2)
    weight *= offset.abs() <= radius.unsqueeze(1)
    return (weight / weight.sum(1, keepdim=True)).float()


def gaussian_blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns with a kernel each image has, or all share.

    Args:
        image: (N, C, H, W) float32; H and W are above the radius.
        kernel: (N or 1, 2 radius + 1) float32.
    """
    along = by_shifts if image.device.type == "cpu" else by_matrix
    return along(along(image, kernel, -1), kernel, -2)


def by_shifts(image: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """One weighted addition a tap: on a CPU, three times as fast as any convolution of PyTorch."""
    radius, side = kernel.shape[1] // 2, image.shape[axis]
    before = image.narrow(axis, 1, radius).flip(axis)
    after = image.narrow(axis, side - 1 - radius, radius).flip(axis)
    padded = torch.cat([before, image, after], axis)
    weights = kernel.view(*kernel.shape, 1, 1, 1).unbind(1)
    result = padded.narrow(axis, 0, side) * weights[0]
    for tap in range(1, len(weights)):
        result.addcmul_(padded.narrow(axis, tap, side), weights[tap])
    return result


def by_matrix(image: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """One product with a banded matrix: on a GPU, a pass a tap would wait for memory."""
    radius, side = kernel.shape[1] // 2, image.shape[axis]
    place = torch.arange(side, device=image.device).unsqueeze(1)
    source = (place + torch.arange(-radius, radius + 1, device=image.device)).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)  # (side, taps)
    size = len(kernel)
    matrix = torch.zeros(size, side, side, device=image.device)
    matrix.scatter_add_(
        2, source.expand(size, -1, -1), kernel.unsqueeze(1).expand(-1, side, -1).contiguous()
    )
    matrix = matrix.unsqueeze(1)
    return image @ matrix.mT if axis == -1 else matrix @ image


def shared_blur(image: Tensor, taps: int, sigma: float) -> Tensor:
    """Blur all images alike, with a window of `taps` pixels."""
    kernel = gaussian_kernel(torch.tensor([sigma]), torch.tensor([taps // 2]))
    return gaussian_blur(image, to_device(kernel, image.device))


def high_pass(image: Tensor, recipe: Recipe) -> Tensor:
    """x - GaussianBlur(x) (loader.py of the released code). (N, 3, H, W) float32 -> the same."""
    return image - shared_blur(image, recipe.high_pass_kernel, recipe.high_pass_sigma)
