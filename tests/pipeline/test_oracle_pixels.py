"""Every pixel of query, key and hard negative against the oracle, to 1e-4 normalized units.

The views are random 8-bit images; parameters and masks are those that the pipeline reports.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import RECIPES, Recipe
from pipeline.assemble import View, assemble
from pipeline.rng import BatchRng
from tests.pipeline import oracle

TOLERANCE = 1e-4
REPORT = frozenset({"masks", "photometric"})
gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def views(size: int, recipe: Recipe, device: str = "cpu", seed: int = 0) -> list[View]:
    """Return query and key of `size` samples: coarse colors and fine noise, some gray or black."""
    random = np.random.default_rng(seed)
    side, pair = recipe.crop_size, []
    for _ in range(2):
        coarse = random.integers(0, 256, (size, 7, 7, 3)).repeat(side // 7, 1).repeat(side // 7, 2)
        pixels = np.clip(coarse + random.normal(0, 30, coarse.shape), 0, 255).astype(np.uint8)
        pixels[0] = pixels[0, :, :, :1]  # gray
        pixels[1] = 0
        pixels[2, : side // 2] = (255, 0, 0)
        image = torch.from_numpy(pixels).to(device)
        saliency = torch.from_numpy(random.random((size, 7, 7), np.float32)).to(device)
        pair.append(View(image, saliency, torch.zeros(size, 4)))
    return pair


def step(recipe: Recipe, size: int, device: str = "cpu", seed: int = 0) -> tuple[list[View], dict]:
    pair = views(size, recipe, device, seed)
    fields = assemble(*pair, recipe, BatchRng(seed, 0, np.arange(size), device), REPORT)
    return pair, fields


def hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).cpu().numpy()


def assert_as_the_oracle_has_it(pair: list[View], fields: dict[str, Any], recipe: Recipe) -> None:
    """Assert that all pixels except noise are those of the oracle."""
    size = len(pair[0].image)
    view_parameters = [
        dataclasses.asdict(fields[f"{name}_photometric"]) for name in ("query", "key")
    ]
    for index in range(size):
        query, key = (
            oracle.encoder_view(
                view.image[index].cpu().numpy(), parameters, index, recipe.high_pass
            )
            for view, parameters in zip(pair, view_parameters, strict=True)
        )
        actual = [("query", index, query), ("key", index, key)]
        actual += [
            ("hard_negative", number * size + index, key) for number in range(recipe.hard_negatives)
        ]
        for name, row, view in actual:
            mask = fields.get(f"{name}_mask")
            if mask is not None:
                fill = recipe.fill.removesuffix("-released")
                view = oracle.filled(view, hwc(mask[row]), fill)  # noqa: PLW2901
            image = hwc(fields[name][row])
            known = ~np.isnan(view)
            assert known.any()
            assert np.abs(image - view)[known].max() < TOLERANCE, (name, row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_at_224(name: str, device: str) -> None:
    pair, fields = step(RECIPES[name], 12, device)
    assert_as_the_oracle_has_it(pair, fields, RECIPES[name])


@pytest.mark.parametrize("branch", ["query", "key", "both"])
@pytest.mark.parametrize("fill", ["noise", "blur", "mean"])
def test_each_fill_on_each_branch(fill: str, branch: str) -> None:
    names = {"noise": "hp", "blur": "blur", "mean": "mean"}
    recipe = dataclasses.replace(
        RECIPES[names[fill]], branch=branch, crop_size=56, hard_negatives=1
    )
    pair, fields = step(recipe, 10)
    assert_as_the_oracle_has_it(pair, fields, recipe)
    assert ("query_mask" in fields) == (branch in ("query", "both"))
    assert ("key_mask" in fields) == (branch in ("key", "both"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_number_of_hard_negatives_each_with_its_own_mask(number: int) -> None:
    recipe = dataclasses.replace(RECIPES["blur"], hard_negatives=number, crop_size=56)
    pair, fields = step(recipe, 10)
    assert_as_the_oracle_has_it(pair, fields, recipe)
    assert len(fields.get("hard_negative", ())) == 10 * number
    if number == 2:
        first, second = fields["hard_negative_mask"].split(10)
        assert (first != second).flatten(1).any(1).float().mean() > 0.8


@pytest.mark.parametrize("device", DEVICES)
def test_noise_has_the_recipes_spread_and_is_each_views_own(device: str) -> None:
    recipe = dataclasses.replace(
        RECIPES["hp"], query_ratio=(1.0, 1.0), hard_negative_ratio=(1.0, 1.0), query_mask="random",
        hard_negative_mask="random", focal_probability=0.0, crop_size=112,
    )  # fmt: skip
    _, fields = step(recipe, 64, device)
    for name, std in (("query", 0.18), ("hard_negative", 0.14)):
        noise = fields[name].double()
        assert fields[f"{name}_mask"].all()
        numbers = 64 * 3 * 16 * 16  # one tile of a cell per view
        assert abs(noise.mean()) < 5 * std / numbers**0.5
        assert abs(noise.std() - std) < 5 * std / (2 * numbers) ** 0.5
        tiles = noise.unfold(2, 16, 16).unfold(3, 16, 16)
        assert (tiles == tiles[:, :, :1, :1]).all()
    # D9: views, roles and channels share no noise
    tiles = torch.cat([fields[name][:, :, :16, :16] for name in ("query", "hard_negative")])
    likeness = torch.corrcoef(tiles.flatten(2).flatten(0, 1).double()).fill_diagonal_(0)
    assert likeness.abs().max() < 6 / 16


@gpu
@pytest.mark.parametrize("name", RECIPES)
def test_cpu_and_gpu_agree_but_for_noise(name: str) -> None:
    recipe = RECIPES[name]
    (_, host), (_, device) = step(recipe, 16), step(recipe, 16, "cuda")
    for field in ("query", "key", "hard_negative"):
        if field not in host:
            continue
        noisy = host.get(f"{field}_mask") if recipe.fill.startswith("noise") else None
        if noisy is not None:
            assert torch.equal(noisy, device[f"{field}_mask"].cpu()), field
        difference = (host[field] - device[field].cpu()).abs()
        difference = difference if noisy is None else difference[~noisy]
        assert difference.max() < TOLERANCE, field


def test_the_order_of_torchvisions_adjustments_and_their_values() -> None:
    """Compare with another reference: torchvision's functions in the reported order."""
    from torchvision.transforms.v2 import functional

    recipe = dataclasses.replace(
        RECIPES["none"], crop_size=56, grayscale_probability=0.0, soft_blur_probability=0.0,
        jitter_probability=1.0,
    )  # fmt: skip
    (query, _), fields = step(recipe, 24)
    parameters = fields["query_photometric"]
    adjust = [
        (functional.adjust_brightness, parameters.brightness),
        (functional.adjust_contrast, parameters.contrast),
        (functional.adjust_saturation, parameters.saturation),
        (functional.adjust_hue, parameters.hue),
    ]
    for index in range(24):
        image = query.image[index].permute(2, 0, 1).double() / 255
        for kind in parameters.order[index].tolist():
            function, values = adjust[kind]
            image = function(image, float(values[index]))
        expected = functional.normalize(image, oracle.MEAN.tolist(), oracle.STD.tolist())
        # torchvision's weight of red in gray is 0.2989, PIL's 0.299
        assert (fields["query"][index] - expected).abs().max() < 2e-3
