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
    def device(self) -> str:
        """`cuda` or `cpu`: where its work is done, which decides how far workers share it."""
        ...

    @property
    def weights_sha256(self) -> str | None:
        """Of the backbone's weights; None without any."""
        ...

    def __call__(self, images: Any) -> np.ndarray:
        """Saliency of whole images.

        Args:
            images: DALI batch of N images, (height, width, 3) uint8 RGB each, oriented, on the
                GPU if there is one. `squash` makes one tensor of them; `[np.asarray(image.cpu())
                for image in images]` makes arrays.

        Returns:
            (N, side, side) float32 on any scale; more is more salient.
        """
        ...
