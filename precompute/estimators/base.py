"""The protocol that every saliency estimator implements."""

from typing import Any, Protocol

import numpy as np


class Estimator(Protocol):
    """Estimator of saliency maps; stays in the worker that created it."""

    @property
    def side(self) -> int:
        """Number of cells along one side of every map."""
        ...

    @property
    def device(self) -> str:
        """Device that does the work, `cuda` or `cpu`; decides what workers share in `--dry-run`."""
        ...

    @property
    def network_on_gpu(self) -> bool:
        """Return whether a network that is known to run on a GPU does the work."""
        ...

    @property
    def weights_sha256(self) -> str | None:
        """Digest of the backbone's weights; None for an estimator without weights."""
        ...

    def __call__(self, images: Any) -> np.ndarray:
        """Estimate the saliency of whole images.

        Args:
            images: DALI batch of N images, (height, width, 3) uint8 RGB each, oriented, on the
                GPU if there is one. `squash` turns them into one tensor;
                `[np.asarray(image.cpu()) for image in images]` gives arrays.

        Returns:
            (N, side, side) float32 on any scale; higher is more salient.
        """
        ...
