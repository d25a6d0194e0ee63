"""Estimator that calls a user's function: `--estimator ./my_maps.py:center`."""

from typing import Any

import numpy as np
import torch

from schemas.cli import digest_source, import_object
from schemas.errors import UserError


class FunctionEstimator:
    """Implement `Estimator` with a user's function.

    `weights_sha256` is the digest of the function's file, so a job is not resumed after its code
    has changed.

    Args:
        path: `FILE.py:function` or `module:function`. The function takes a list of
            (height, width, 3) uint8 arrays and returns (N, side, side) floats; higher is more
            salient. The side must be the same for images of all sizes.

    Raises:
        UserError: there is no such function, or it does not return maps.
    """

    def __init__(self, path: str):
        self.function = import_object("estimator", path)
        self.path = path
        # It is unknown whether the function uses a GPU. Assuming that it does gives the more
        # cautious estimate of what further workers gain.
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network_on_gpu = False
        self.weights_sha256 = digest_source("estimator", path)
        # noise: a function may divide by the mean or the variance of its image
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        self.side = self.maps([noise]).shape[-1]

    def __call__(self, images: Any) -> np.ndarray:
        maps = self.maps([np.asarray(image.cpu()) for image in images])
        if maps.shape[-1] != self.side:
            raise UserError(
                f"estimator {self.path}: returned {maps.shape} for {len(maps)} images, not "
                f"{(len(maps), self.side, self.side)} as it did for an image of 32 x 32 pixels; "
                "let it return maps of one side for images of all sizes"
            )
        return maps

    def maps(self, arrays: list[np.ndarray]) -> np.ndarray:
        maps = np.asarray(self.function(arrays), dtype=np.float32)
        if maps.ndim != 3 or len(maps) != len(arrays) or maps.shape[1] != maps.shape[2]:
            raise UserError(
                f"estimator {self.path}: returned {maps.shape} for {len(arrays)} images, not "
                "(images, side, side)"
            )
        return maps
