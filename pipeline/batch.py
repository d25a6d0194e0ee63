"""What a step of `MaskedViews` hands out."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from pipeline.photometric import Photometric

Extra = Literal["masks", "saliency", "windows", "crops", "photometric", "keys"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)


@dataclass(frozen=True, eq=False)
class Batch:
    """N samples on the device. Images are float32, normalised, channels_last; H = W = crop_size.

    With n hard negatives a key, row j * N + i of `hard_negative` is the j-th of sample i.

    Attributes:
        query, key: (N, 3, H, W). key: None where the recipe makes no pairs.
        hard_negative: (n * N, 3, H, W), or None where the recipe has none.
        label: (N,) int64; -1 for none.
        query_regions, key_regions: (N, R, 4) float32, x0 y0 x1 y1 in pixels of the view: the same
            part of the image in both; None where the recipe has no regions.
        region_valid: (N, R) bool, False where the views' overlap is too small for a region; its box
            is then the whole view, and nothing of it is masked.
        query_mask, key_mask, hard_negative_mask: extra "masks": bool, as their images, True where
            filled; None where nothing is masked.
        query_ratio, key_ratio, hard_negative_ratio: extra "masks": float64, the drawn mask ratio of
            each row; focal windows do not follow it. None where nothing is masked.
        query_focal, key_focal, hard_negative_focal: extra "masks": bool, rows with a window in
            place of cells; likewise.
        query_saliency, key_saliency: extra "saliency": (N, grid, grid) float32 in 0 .. 255, what
            the masks were drawn from.
        query_window, key_window: extra "windows": (N, 4) float32 on the CPU, y0 x0 y1 x1 as shares
            of the image; x0 > x1 when flipped.
        query_crop, key_crop: extra "crops": (N, 3, H, W) uint8, cut and not yet changed.
        query_photometric, key_photometric: extra "photometric": what changed the colours.
        sample_keys: extra "keys": N sample keys.
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
