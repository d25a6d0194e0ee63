"""Named recipes: all parameters of the views, masks and fills.

The photometric augmentation is MoCo v2's `--aug-plus` (facebookresearch/moco, main_moco.py). Masks
and fills are those of the released code of the saliency-guided masking method (WACV 2024; loader.py
and random_mask_*.py of joycenerd/Saliency-Guided-Masking-for-ConvNets), in the form that its poster
describes; if the two differ, the module that implements the feature says so. Lengths are in pixels.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from schemas import UserError
from schemas.cli import lookup

REFERENCE_CROP = 224
"""Crop size in pixels to which the sizes of the focal windows refer."""

SOFT_BLUR_SIGMAS = 3
"""Radius of the photometric blur in units of its sigma (our choice)."""

Range = tuple[float, float]
Branch = Literal["query", "key", "both"]
Interpolation = Literal["bilinear", "bicubic"]
RegionChoice = Literal["random", "salient"]

VIEW_FIELDS = (
    "crop_size", "crop_area", "crop_ratio", "interpolation", "pair", "flip_probability",
    "jitter_probability", "brightness", "contrast", "saturation", "hue", "grayscale_probability",
    "soft_blur_probability", "soft_blur_sigma",
)  # fmt: skip
"""Fields of a recipe for crops and photometric augmentation; the others are for masking."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Parameters of the views and their masks. The defaults are those of `hp`.

    Raises:
        UserError: a value is invalid; the message names the field.
    """

    crop_size: int = REFERENCE_CROP
    """Side of a view in pixels; a multiple of `grid` if cells are masked. Kernel sizes do not scale
    with it."""
    crop_area: Range = (0.2, 1.0)
    """Range of the share of the image's area that a crop covers (MoCo v2)."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Range of the width of a crop over its height (torchvision's RandomResizedCrop)."""
    interpolation: Interpolation = "bilinear"
    """Antialiased interpolation from a crop to its view (MoCo v2: bilinear; SimCLR, solo-learn and
    ADIOS: bicubic). The saliency is always resized bilinearly."""
    pair: bool = True
    """Make a query and a key from each image; without it, a query only, for methods with labels."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip (MoCo v2)."""

    jitter_probability: float = 0.8
    """Probability of color jitter: brightness, contrast, saturation and hue together (MoCo v2)."""
    brightness: float = 0.4
    """Strength b of brightness jitter; the factor is drawn from 1 - b .. 1 + b (MoCo v2)."""
    contrast: float = 0.4
    """Strength of contrast jitter, about the view's mean gray (MoCo v2)."""
    saturation: float = 0.4
    """Strength of saturation jitter, about each pixel's gray (MoCo v2)."""
    hue: float = 0.1
    """Strength h of hue jitter; the shift is drawn from -h .. h, in turns of the color circle (MoCo
    v2)."""
    grayscale_probability: float = 0.2
    """Probability of grayscale (MoCo v2)."""
    soft_blur_probability: float = 0.5
    """Probability of the photometric Gaussian blur (MoCo v2)."""
    soft_blur_sigma: Range = (0.1, 2.0)
    """Range of the photometric blur's standard deviation in pixels (MoCo v2: the radius of PIL's
    GaussianBlur)."""

    high_pass: bool = True
    """Feed the encoder x - GaussianBlur(x) instead of x, in every view (loader.py)."""
    high_pass_kernel: int = 11
    """Kernel size of the high-pass filter's blur in pixels, odd (loader.py)."""
    high_pass_sigma: float = 5.0
    """Standard deviation of the high-pass filter's blur in pixels (loader.py)."""

    fill: str = "noise"
    """Content of masked pixels: noise, blur, mean or another name in `pipeline.fills.FILLS`; a
    custom function as `FILE.py:function` or `module:function`; or none for no masks."""
    noise_query: float = 0.18
    """Standard deviation of the noise in query and key, in normalized units (random_mask_hp.py)."""
    noise_hard_negative: float = 0.14
    """Standard deviation of a hard negative's noise, in normalized units (random_mask_hp.py)."""
    blur_kernel: int = 31
    """Kernel size in pixels of the blur that fills masked pixels, odd (loader.py)."""
    blur_sigma: float = 10.0
    """Standard deviation in pixels of the blur that fills masked pixels (loader.py)."""

    grid: int = 7
    """Number of mask cells along a side of a view; 7 is ResNet-50's last feature map at 224 pixels
    (localize.py)."""
    foreground_margin: float = 0.6
    """Foreground margin: a cell with A >= mean - margin * std is foreground (relaxed SCDA; poster,
    localize.py)."""
    query_mask: str = "spread"
    """Mask of a query: a name in `pipeline.masks.MASKS`, or a custom function as `FILE.py:function`
    or `module:function`."""
    hard_negative_mask: str = "foreground"
    """Mask of a hard negative: a name in `pipeline.masks.MASKS`, or a custom function."""
    branch: Branch = "query"
    """Branch that gets the query's mask (poster: query; its ablation: all three choices)."""
    query_ratio: Range = (0.05, 0.25)
    """Range of a query's mask ratio; for `spread`, the share of all cells (main_moco.py)."""
    hard_negatives: int = 1
    """Number of hard negatives per key (released README: 1)."""
    hard_negative_ratio: Range = (0.4, 0.7)
    """Range of a hard negative's mask ratio; for `foreground`, the share of the foreground cells
    (main_moco.py)."""
    regions: int = 0
    """Number of boxes that both views of an image show; the query mask `regions` fills them."""
    region_extent: Range = (0.3, 0.7)
    """Range of the share of the views' overlap that a region covers along each axis (our
    choice)."""
    region_choice: RegionChoice = "random"
    """Choice of regions: random boxes, or the most salient of `region_candidates` boxes (our
    choice)."""
    region_candidates: int = 8
    """Number of boxes from which a salient region is chosen (our choice)."""
    foreground_cap: Range | None = (0.56, 0.55)
    """Cap on ratio * foreground share as (limit, value): from the limit on, the value is used
    instead; none for no cap (random_mask_hp.py)."""
    focal_probability: float = 0.2
    """Probability of one focal window instead of grid cells (random_mask_hp.py)."""
    channel_probability: float = 0.7
    """Probability of separate cells per channel, if grid cells are masked (random_mask_hp.py)."""
    focal_kept: int = 200
    """Side of the focal window that is kept in a query, in pixels of a 224-pixel crop; it scales
    with the crop."""
    focal_filled: int = 130
    """Side of the focal window that is filled in a hard negative, in pixels of a 224-pixel crop; it
    scales with the crop (random_mask_hp.py)."""

    def __post_init__(self) -> None:
        self._freeze_lists()
        self._check_fields()
        self._check_combinations()

    def _check_fields(self) -> None:
        """Check each field by itself."""
        require = self._require
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name.endswith("_probability"):
                require(0 <= value <= 1, name, "a probability, between 0 and 1")
            if name.endswith("_ratio") and name != "crop_ratio":
                require(0 <= value[0] <= value[1] <= 1, name, "low and high, in 0 .. 1")
            if name.endswith("_kernel"):
                require(value > 0 and value % 2 == 1, name, "odd and above 0")
            if name in ("noise_query", "noise_hard_negative", "hard_negatives"):
                require(value >= 0, name, "0 or more")
            if name in ("high_pass_sigma", "blur_sigma", "grid", "crop_size"):
                require(value > 0, name, "above 0")
            if name in ("brightness", "contrast", "saturation"):
                require(0 <= value <= 1, name, "between 0 and 1")
            if name in ("focal_kept", "focal_filled"):
                require(0 < value <= REFERENCE_CROP, name, f"between 1 and {REFERENCE_CROP}")
            if name in ("crop_ratio", "soft_blur_sigma"):
                require(0 < value[0] <= value[1], name, "low and high, above 0")
        low, high = self.crop_area
        require(0 < low <= high <= 1, "crop_area", "low and high, in 0 .. 1")
        require(0 <= self.hue <= 0.5, "hue", "between 0 and 0.5")
        require(self.branch in get_args(Branch), "branch", "query, key or both")
        is_known = self.interpolation in get_args(Interpolation)
        require(is_known, "interpolation", "bilinear or bicubic")
        require(self.region_choice in get_args(RegionChoice), "region_choice", "random or salient")
        if self.foreground_cap is not None:
            limit, value = self.foreground_cap
            is_valid = 0 <= value <= limit
            require(is_valid, "foreground_cap", "(limit, value) with 0 <= value <= limit")
        if self.regions:
            low, high = self.region_extent
            require(0 < low <= high <= 1, "region_extent", "low, high, in 0 .. 1")
            require(self.region_candidates > 0, "region_candidates", "above 0")

    def _check_combinations(self) -> None:
        """Check fields whose valid values depend on other fields."""
        require, side = self._require, self.crop_size
        nearest = max(1, round(side / self.grid)) * self.grid
        require(
            not self.masks_cells or nearest == side,
            "crop_size",
            f"a multiple of the grid of {self.grid} cells a side (--recipe.grid), say {nearest}",
        )
        # a reflected border must lie inside the view
        widest = max(
            [1]
            + [self.high_pass_kernel // 2 + 1] * self.high_pass
            + [self.blur_kernel // 2 + 1] * (self.fill == "blur")
            + [math.ceil(SOFT_BLUR_SIGMAS * self.soft_blur_sigma[1]) + 1]
            * (self.soft_blur_probability > 0)
        )
        require(side >= widest, "crop_size", f"at least {widest}")
        require(
            self.hard_negative_mask != "regions",
            "hard_negative_mask",
            "another mask: only a query can have `regions`",
        )
        if self.query_mask == "regions":
            require(self.regions > 0, "regions", "1 or more for the mask `regions`")
            require(self.branch == "query", "branch", "query for the mask `regions`")
        if self.regions:
            require(self.pair, "pair", "true if there are regions")
        if not self.pair:
            require(self.branch == "query", "branch", "query if there is no key")
            require(self.hard_negatives == 0, "hard_negatives", "0 without pairs")
        require(
            self.fill != "none" or self.hard_negatives == 0,
            "hard_negatives",
            "0 if the fill is none: an unmasked hard negative equals the key",
        )

    def _require(self, is_valid: bool, name: str, requirement: str) -> None:
        """Raise a UserError that names a field and its requirement, unless its value is valid."""
        if not is_valid:
            raise UserError(f"recipe: {name} is {getattr(self, name)}, it must be {requirement}")

    def _freeze_lists(self) -> None:
        """Turn lists into tuples: recipes are hashed, because each has its compiled functions."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    @property
    def masks_cells(self) -> bool:
        """True if masks or fills consist of cells, so that `grid` must divide the crop."""
        if self.fill == "none":
            return False
        has_only_boxes = self.query_mask == "regions" and self.hard_negatives == 0
        return not has_only_boxes or self.fill not in ("mean", "blur")

    @property
    def uses_saliency(self) -> bool:
        """True if making the views takes saliency: all masks are given it, also random ones."""
        return self.fill != "none" or (self.regions > 0 and self.region_choice == "salient")

    @property
    def cell(self) -> int:
        """Side of a cell in pixels: 32 for a crop of 224."""
        return self.crop_size // self.grid

    def focal_side(self, window: int) -> int:
        """Return the side of a focal window, scaled to this recipe's crop; at least one pixel."""
        return max(1, round(window * self.crop_size / REFERENCE_CROP))


HP = Recipe()
# with the same cells in all channels, without focal windows or a cap
MEAN = Recipe(
    high_pass=False,
    fill="mean",
    foreground_cap=None,
    focal_probability=0.0,
    channel_probability=0.0,
)

RECIPES: dict[str, Recipe] = {
    "hp": HP,
    "blur": replace(MEAN, fill="blur"),
    "mean": MEAN,
    # in the style of MSCN (Jing et al. 2022 released no code): hp's masks, but independent of
    # saliency, on both views
    "mscn": Recipe(query_mask="random", branch="both", hard_negatives=0),
    # MaskCo (Zhao et al. 2021 released no code): boxes that both views show are filled in the query
    "maskco": replace(MEAN, query_mask="regions", regions=2, hard_negatives=0),
    # plain MoCo v2
    "none": Recipe(high_pass=False, fill="none", hard_negatives=0),
}


def get_recipe(name: str) -> Recipe:
    """Return the recipe of this name.

    Raises:
        UserError: there is no such recipe; the message suggests the nearest name.
    """
    return lookup("recipe", name, RECIPES)
