"""Gaussian blur and high-pass of a batch of images.

The border is reflected without repeating the edge and kernels are cut at a radius and sum to one,
as in torchvision's GaussianBlur. A blur's kernel sums to one, so blurring commutes with
normalisation.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from pipeline.devices import to_device
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
        kernel: (N or 1, 2 radius + 1) float32, symmetric, on the host.
    """
    if image.device.type == "cpu":
        if len(kernel) == 1:
            return by_lanes(image, kernel[0])
        return torch.cat(
            [
                by_lanes(one.unsqueeze(0), weights[weights > 0])
                for one, weights in zip(image, kernel, strict=True)
            ]
        )
    kernel = to_device(kernel, image.device)
    return by_matrix(by_matrix(image, kernel, -1), kernel, -2)


def by_lanes(image: Tensor, taps: Tensor) -> Tensor:
    """On a CPU: along each axis, with pieces of the other axis as the channels of a convolution.

    PyTorch's convolution with a kernel a channel is fast where channels are many and lie side by
    side in memory; with an image's own three it takes ten times as long.
    """
    planes = image.flatten(0, 1)
    for _ in range(2):
        planes = along_rows(planes.transpose(1, 2), taps)
    return planes.unflatten(0, image.shape[:2])


def along_rows(planes: Tensor, taps: Tensor) -> Tensor:
    """(M, A, B) convolved along A."""
    radius, (count, side, width) = len(taps) // 2, planes.shape
    before, after = planes[:, 1 : radius + 1].flip(1), planes[:, side - 1 - radius : side - 1]
    padded = torch.cat([before, planes, after.flip(1)], 1)
    lanes = next(size for size in range(32, 0, -1) if width % size == 0)
    weights = taps.view(1, 1, -1, 1).expand(lanes, 1, -1, 1).contiguous()
    pieces = padded.view(count, side + 2 * radius, width // lanes, lanes).permute(0, 3, 1, 2)
    found = conv2d(pieces, weights, groups=lanes)  # channels_last in and out
    return found.permute(0, 2, 3, 1).reshape(planes.shape)


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
    return gaussian_blur(image, kernel)


def high_pass(image: Tensor, recipe: Recipe) -> Tensor:
    """x - GaussianBlur(x) (loader.py of the released code). (N, 3, H, W) float32 -> the same."""
    return image - shared_blur(image, recipe.high_pass_kernel, recipe.high_pass_sigma)
