"""What every saliency estimator is."""

from typing import Any, Protocol

import numpy as np


class Estimator(Protocol):
    """Estimates maps, in the worker that made it."""

    @property
    def side(self) -> int:
        """Cells on a side of every map."""
        ...

    @property
    def weights_sha256(self) -> str | None:
        """Of the backbone's weights; None without any."""
        ...

    def __call__(self, images: Any) -> np.ndarray:
        """Saliency of whole images.

        Args:
            images: DALI batch of N images, (height, width, 3) uint8 RGB each, oriented. `squash`
                makes one tensor of them; `[np.asarray(image) for image in images]` arrays.

        Returns:
            (N, side, side) float32 on any scale; more is more salient.
        """
        ...
