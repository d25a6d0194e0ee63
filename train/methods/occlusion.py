"""ADIOS's occlusion network: an image -> N soft masks that partition its pixels.

A U-Net after GENESIS's (YugeTen/adios, unet.py and blocks.py). A block is a 3 x 3 convolution, a
norm (or, without one, a bias) and a ReLU. Maps are halved between blocks on the way down, pass an
MLP at the smallest size, and are doubled on the way up, concatenated with the maps of the way down.
A 1 x 1 convolution and a softmax turn them into N masks.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from schemas import UserError

Norm = Literal["group", "instance", "none"]
BOTTLENECK = 128
GROUPS = 8
# multiples of the base width for each number of blocks: down, then up
WIDTHS = {
    4: ((1, 2, 2, 2), (2, 2, 1, 1)),
    5: ((1, 1, 2, 2, 2), (2, 2, 1, 1, 1)),
    6: ((1, 1, 1, 2, 2, 2), (2, 2, 1, 1, 1, 1)),
}


class OcclusionNet(nn.Module):
    """Map (N, 3, S, S) to (N, masks, S, S) float32; the masks of each pixel sum to 1.

    Raises:
        UserError: the side of the crop cannot be halved often enough, or the channels cannot be
            grouped.
    """

    def __init__(self, side: int, *, masks: int, channels: int, norm: Norm) -> None:
        super().__init__()
        count = min(6, max(4, math.floor(math.log2(side) - 1)))
        smallest = side >> (count - 1)
        if smallest << (count - 1) != side:
            raise UserError(
                f"--crop-size {side}: adios halves it {count - 1} times; "
                f"the nearest that does is {round(side / 2 ** (count - 1)) * 2 ** (count - 1)}"
            )
        if norm == "group" and channels % GROUPS:
            raise UserError(
                f"--channels {channels}: group norm needs a multiple of {GROUPS}; "
                "or take --norm instance"
            )
        down, up = ([channels * width for width in widths] for widths in WIDTHS[count])
        self.down = nn.ModuleList(
            build_block(before, after, norm)
            for before, after in zip([3, *down], down, strict=False)
        )
        flat = down[-1] * smallest**2
        self.bottleneck = nn.Sequential(
            nn.Flatten(),
            nn.Linear(flat, BOTTLENECK),
            nn.ReLU(inplace=True),
            nn.Linear(BOTTLENECK, BOTTLENECK),
            nn.ReLU(inplace=True),
            nn.Linear(BOTTLENECK, flat),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (down[-1], smallest, smallest)),
        )
        below = [down[-1], *up]
        self.up = nn.ModuleList(
            build_block(before + skip, after, norm)
            for before, skip, after in zip(below, reversed(down), up, strict=False)
        )
        self.head = nn.Conv2d(up[-1], masks, 1)

    def forward(self, image: Tensor) -> Tensor:
        maps: list[Tensor] = []
        x = image
        for layer in self.down:
            x = layer(x if not maps else interpolate(x, scale_factor=0.5, mode="nearest"))
            maps.append(x)
        x = self.bottleneck(x)
        for number, (layer, skip) in enumerate(zip(self.up, reversed(maps), strict=True)):
            x = x if number == 0 else interpolate(x, scale_factor=2.0, mode="nearest")
            x = layer(torch.cat([x, skip], dim=1))
        return self.head(x).float().softmax(dim=1)


def build_block(before: int, after: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1, bias=norm == "none")]
    if norm == "group":
        layers.append(nn.GroupNorm(GROUPS, after))
    elif norm == "instance":
        layers.append(nn.InstanceNorm2d(after, affine=True))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))
