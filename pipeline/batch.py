"""The batch that `MaskedViews` yields at each step."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from pipeline.photometric import Photometric

Extra = Literal["masks", "saliency", "windows", "crops", "photometric", "keys"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples on the device. Images are float32, normalized, channels_last; H = W = crop_size.

    With n hard negatives per key, row j * N + i of `hard_negative` is the j-th one of sample i.

    Attributes:
        query, key: (N, 3, H, W). `key` is None if the recipe makes no pairs.
        hard_negative: (n * N, 3, H, W), or None if the recipe has none.
        label: (N,) int64; -1 for samples without a label.
        query_regions, key_regions: (N, R, 4) float32, x0 y0 x1 y1 in pixels of the view; both
            show the same part of the image. None if the recipe has no regions.
        region_valid: (N, R) bool, False where the views' overlap is too small for a region; the box
            is then the entire view, and none of it is masked.
        query_mask, key_mask, hard_negative_mask: extra "masks": bool, the shape of their images,
            True where filled; None if these views are not masked.
        query_ratio, key_ratio, hard_negative_ratio: extra "masks": (rows,) float64, the drawn mask
            ratio, which focal windows do not follow; for the mask `regions`, the share of the view
            that is filled. None if these views are not masked.
        query_focal, key_focal, hard_negative_focal: extra "masks": (rows,) bool, True for a focal
            window instead of grid cells. None if these views are not masked.
        query_saliency, key_saliency: extra "saliency": (N, grid, grid) float32 in 0 .. 255, from
            which the masks were drawn.
        query_window, key_window: extra "windows": crop windows, (N, 4) float32 on the CPU, y0 x0 y1
            x1 as fractions of the image; x0 > x1 if flipped.
        query_crop, key_crop: extra "crops": (N, 3, H, W) uint8, before any augmentation.
        query_photometric, key_photometric: extra "photometric": the parameters of color
            jitter, grayscale and blur.
        sample_keys: extra "keys": the N sample keys.
    """

    query: Tensor
    key: Tensor | None
    hard_negative: Tensor | None
    label: Tensor
    query_regions: Tensor | None = None
    key_regions: Tensor | None = None
    region_valid: Tensor | None = None
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    hard_negative_mask: Tensor | None = None
    query_ratio: Tensor | None = None
    key_ratio: Tensor | None = None
    hard_negative_ratio: Tensor | None = None
    query_focal: Tensor | None = None
    key_focal: Tensor | None = None
    hard_negative_focal: Tensor | None = None
    query_saliency: Tensor | None = None
    key_saliency: Tensor | None = None
    query_window: Tensor | None = None
    key_window: Tensor | None = None
    query_crop: Tensor | None = None
    key_crop: Tensor | None = None
    query_photometric: Photometric | None = None
    key_photometric: Photometric | None = None
    sample_keys: list[str] | None = None
