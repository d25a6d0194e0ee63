"""Gaussian blur and high-pass of a batch of images.

The border is reflected without repeating the edge; kernels are truncated at a radius and sum to
one, as in torchvision's GaussianBlur, so blurring commutes with normalization. `pipeline.fused`
has the same blurs in a form that a compiler can fuse.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from pipeline.devices import to_device
from pipeline.recipes import Recipe


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
    return build_gaussian_kernel(sigma, (3 * sigma).ceil().long())


def build_shared_kernel(taps: int, sigma: float) -> Tensor:
    """Return the (1, taps) kernel of a blur that is the same for all images."""
    return build_gaussian_kernel(torch.tensor([sigma]), torch.tensor([taps // 2]))


def apply_gaussian_blur(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve rows and columns with one kernel per image, or with one shared kernel.

    Args:
        image: (N, C, H, W) float32; H and W exceed the radius.
        kernel: (N or 1, 2 radius + 1) float32, symmetric, on the host.
    """
    if image.device.type == "cpu":
        if len(kernel) == 1:
            return blur_on_cpu(image, kernel[0])
        return torch.cat(
            [
                blur_on_cpu(single.unsqueeze(0), weights[weights > 0])
                for single, weights in zip(image, kernel, strict=True)
            ]
        )
    return blur_by_matrix(image, to_device(kernel, image.device))


def blur_on_cpu(image: Tensor, taps: Tensor) -> Tensor:
    """Blur on a CPU: along each axis, pieces of the other axis are the channels of a convolution.

    PyTorch's depthwise convolution is fast with many channels that are contiguous in memory; with
    the three channels of an image it takes ten times as long.
    """
    planes = image.flatten(0, 1)
    for _ in range(2):
        planes = blur_rows(planes.transpose(1, 2), taps)
    return planes.unflatten(0, image.shape[:2])


def blur_rows(planes: Tensor, taps: Tensor) -> Tensor:
    """Convolve planes (M, A, B) along A."""
    radius, (count, side, width) = len(taps) // 2, planes.shape
    before, after = planes[:, 1 : radius + 1].flip(1), planes[:, side - 1 - radius : side - 1]
    padded = torch.cat([before, planes, after.flip(1)], 1)
    lanes = next(size for size in range(32, 0, -1) if width % size == 0)
    weights = taps.view(1, 1, -1, 1).expand(lanes, 1, -1, 1).contiguous()
    pieces = padded.view(count, side + 2 * radius, width // lanes, lanes).permute(0, 3, 1, 2)
    blurred = conv2d(pieces, weights, groups=lanes)  # channels_last in and out
    return blurred.permute(0, 2, 3, 1).reshape(planes.shape)


def blur_by_matrix(image: Tensor, kernel: Tensor) -> Tensor:
    """Blur on a GPU without a compiler: one product with a banded matrix per axis.

    One pass per tap would be limited by memory bandwidth. No matrix is copied for the channels:
    rows take one product for all channels, columns one product per channel.
    """
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
    """Blur all images with the same Gaussian, whose kernel is `taps` pixels wide."""
    return apply_gaussian_blur(image, build_shared_kernel(taps, sigma))


def apply_high_pass(image: Tensor, recipe: Recipe) -> Tensor:
    """Return x - GaussianBlur(x), (N, 3, H, W) float32 (loader.py of the released code)."""
    return image - apply_shared_blur(image, recipe.high_pass_kernel, recipe.high_pass_sigma)
