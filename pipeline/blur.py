"""Gaussian blur and high-pass of a batch of images.

The border is reflected without repeating the edge, and kernels are cut at a radius and sum to one,
as in torchvision's GaussianBlur. A blur's kernel sums to one, so blurring commutes with
normalization. `pipeline.fused` has the same blurs in the form that a compiler fuses.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from pipeline.devices import to_device
from pipeline.recipes import Recipe


def gaussian_kernel(sigma: Tensor, radius: Tensor) -> Tensor:
    """Return the weights of Gaussians, each cut at its own radius.

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


def soft_blur_kernel(sigma: Tensor) -> Tensor:
    """Return the kernels of the photometric blur: Gaussians cut at three sigma. (N,) above 0."""
    return gaussian_kernel(sigma, (3 * sigma).ceil().long())


def shared_kernel(taps: int, sigma: float) -> Tensor:
    """Return the kernel (1, taps) of a blur that all images share."""
    return gaussian_kernel(torch.tensor([sigma]), torch.tensor([taps // 2]))


def gaussian_blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns with one kernel per image, or one that all share.

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
    return by_matrix(image, to_device(kernel, image.device))


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
    """Convolve (M, A, B) along A."""
    radius, (count, side, width) = len(taps) // 2, planes.shape
    before, after = planes[:, 1 : radius + 1].flip(1), planes[:, side - 1 - radius : side - 1]
    padded = torch.cat([before, planes, after.flip(1)], 1)
    lanes = next(size for size in range(32, 0, -1) if width % size == 0)
    weights = taps.view(1, 1, -1, 1).expand(lanes, 1, -1, 1).contiguous()
    pieces = padded.view(count, side + 2 * radius, width // lanes, lanes).permute(0, 3, 1, 2)
    found = conv2d(pieces, weights, groups=lanes)  # channels_last in and out
    return found.permute(0, 2, 3, 1).reshape(planes.shape)


def by_matrix(image: Tensor, kernel: Tensor) -> Tensor:
    """On a GPU without a compiler: one product with a banded matrix per axis.

    A pass per tap would wait for memory. No matrix is copied for the channels: rows take all
    channels in one product, columns one product per channel.
    """
    rows = image.flatten(1, 2) @ banded_matrix(kernel, image.shape[3]).mT
    rows = rows.view(image.shape)
    matrix = banded_matrix(kernel, image.shape[2]).expand(len(image), -1, -1)
    blurred = torch.empty_like(rows)
    for channel in range(image.shape[1]):
        torch.bmm(matrix, rows[:, channel], out=blurred[:, channel])
    return blurred


def banded_matrix(kernel: Tensor, side: int) -> Tensor:
    """Return the matrices (N, side, side) that blur along an axis of that length."""
    radius, device = kernel.shape[1] // 2, kernel.device
    place = torch.arange(side, device=device).unsqueeze(1)
    source = reflect(place + torch.arange(-radius, radius + 1, device=device), side)
    size = len(kernel)
    matrix = torch.zeros(size, side, side, device=device)
    return matrix.scatter_add_(
        2, source.expand(size, -1, -1), kernel.unsqueeze(1).expand(-1, side, -1).contiguous()
    )


def reflect(place: Tensor, side: int) -> Tensor:
    """Return the pixel, 0 .. side - 1, that a place beyond the border shows."""
    return side - 1 - (side - 1 - place.abs()).abs()


def shared_blur(image: Tensor, taps: int, sigma: float) -> Tensor:
    """Blur all images alike, with a window of `taps` pixels."""
    return gaussian_blur(image, shared_kernel(taps, sigma))


def high_pass(image: Tensor, recipe: Recipe) -> Tensor:
    """Return x - GaussianBlur(x) (loader.py of the released code), (N, 3, H, W) float32."""
    return image - shared_blur(image, recipe.high_pass_kernel, recipe.high_pass_sigma)
