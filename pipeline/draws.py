"""Random numbers of one step, the same on every device."""

import torch
from torch import Tensor


class Draws:
    """Everything that one step of one rank draws after the crop windows.

    Uniform numbers are drawn on the host, so a GPU sees the masks and the jitter that a CPU sees;
    normal ones, of which there are many, are drawn where they are used.

    Args:
        seed: 0 .. 2^31 - 1.
        device: where the numbers are used.
    """

    def __init__(self, seed: int, device: torch.device):
        self.device, self._seed = device, seed
        self._host = torch.Generator().manual_seed(seed)
        self._normal = torch.Generator(device).manual_seed(seed + 2**31)

    def part(self, number: int) -> "Draws":
        """Draws of their own for a part of the batch, whatever the others draw meanwhile."""
        return Draws((self._seed + number * 0x9E3779B1) % 2**31, self.device)

    def on_host(self, *shape: int) -> Tensor:
        """Uniform in 0 .. 1, float64, on the CPU whatever the device."""
        return torch.rand(shape, dtype=torch.float64, generator=self._host)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in 0 .. 1, float64, on the device."""
        return to_device(self.on_host(*shape), self.device)

    def normal(self, *shape: int) -> Tensor:
        """Mean 0 and variance 1, float32, on the device."""
        return torch.randn(shape, device=self.device, generator=self._normal)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Host memory to the device without waiting for what the device does now."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
