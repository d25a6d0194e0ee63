"""Image and saliency get the same window: ramps, whose values tell the position of a pixel.

The saliency is a copy of the image, so a view's grid must show the view's own values, up to half
the step between cells. Tested with EXIF orientations, odd sizes, extreme shapes and single pixels.
"""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import Batch, MaskedViews, photometric
from pipeline.recipes import RECIPES
from schemas import Sample
from tests.pipeline import oracle
from tests.pipeline.conftest import CROP, STILL, Write, rng_of, small, stored

SIZES = [(97, 131), (131, 97), (20, 400), (400, 20), (50, 1), (1, 50), (1, 1), (63, 65)]


def ramp(height: int, width: int, axis: int) -> np.ndarray:
    """Return (height, width) values in 0 .. 255 that grow along `axis` from edge to edge."""
    length = (height, width)[axis]
    values = 255 * (np.arange(length) + 0.5) / length
    return np.broadcast_to(values[:, None] if axis == 0 else values, (height, width))


def sample(key: str, size: tuple[int, int], axis: int, orientation: int) -> Sample:
    seen = Image.fromarray(ramp(*size, axis).round().astype(np.uint8)).convert("RGB")
    flat = size[axis] == 1  # the image is one pixel wide
    saliency = np.full((28, 28), 127.0) if flat else ramp(28, 28, axis)
    return Sample(key, stored(seen, orientation), "jpg", saliency.astype(np.float32), -1, *size)


def first(url: str, size: int, crops_in_graph: bool, **changes: object) -> Batch:
    recipe = small("none", **STILL, **changes)
    views = MaskedViews(url, recipe, size, "cpu", report=("saliency", "windows", "keys"))
    # True: crop with the operators of the graph, as on a GPU
    views._spec = dataclasses.replace(views._spec, on_device=crops_in_graph)
    return next(iter(views))


@pytest.mark.parametrize("crops_in_graph", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_saliency_lies_on_its_image(write: Write, orientation: int, crops_in_graph: bool) -> None:
    sizes = [size for size in SIZES for _ in range(3)]
    samples = [
        sample(f"{axis}-{number}", size, axis, orientation)
        for number, size in enumerate(sizes)
        for axis in (0, 1)
    ]
    batch = first(write(samples).url, len(samples), crops_in_graph)
    assert batch.sample_keys is not None
    flips = 0
    for name in ("query", "key"):
        windows = getattr(batch, f"{name}_window").numpy()
        images = getattr(batch, name).permute(0, 2, 3, 1).double().numpy()
        grids = getattr(batch, f"{name}_saliency").double().numpy()
        for key, window, image, grid in zip(batch.sample_keys, windows, images, grids, strict=True):
            axis, number = map(int, key.split("-"))
            height, width = sizes[number]
            y0, x0, y1, x1 = window
            flips += x0 > x1
            values = (255 * (image * oracle.STD + oracle.MEAN)).mean(2)
            cells = values.reshape(7, CROP // 7, 7, CROP // 7).mean((1, 3))
            extent = abs((y1 - y0, x1 - x0)[axis])
            step = 255 * extent / 7
            if (height, width)[axis] > 1:
                # the ramp's own resolution: half a pixel of the image and half a cell of the map
                edge = 255 * (0.5 / (height, width)[axis] + 0.5 / 28)
                assert np.abs(grid - cells).max() < step / 2 + edge * (extent < 0.5), (key, window)
                # and it grows in the direction of the window
                slope = np.diff(cells.mean(1 - axis)).mean()
                several = round(extent * (height, width)[axis]) > 1
                assert not several or (slope > 0) == ((y1 > y0, x1 > x0)[axis])
                middle = 255 * (y0 + y1, x0 + x1)[axis] / 2
                assert abs(cells.mean() - middle) < step / 2 + 2
            assert abs(abs(y1 - y0) * height - round(abs(y1 - y0) * height)) < 1e-3
            assert 1 <= round(abs(x1 - x0) * width) <= width
    assert 0.3 < flips / (2 * len(samples)) < 0.7


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_graph_and_host_cut_the_same_pixels(write: Write, interpolation: str) -> None:
    random = np.random.default_rng(0)
    samples = []
    for number in range(24):
        coarse = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        size = (int(random.integers(60, 300)), int(random.integers(60, 300)))
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
        grid = np.zeros((28, 28), np.float32)
        samples.append(Sample(f"s{number}", buffer.getvalue(), "png", grid, 0, size[1], size[0]))
    url = write(samples).url
    host, graph = (
        first(url, 24, crops_in_graph, interpolation=interpolation)
        for crops_in_graph in (False, True)
    )
    assert torch.equal(host.query_window, graph.query_window)  # type: ignore[arg-type]
    difference = 255 * (host.query - graph.query).abs() * 0.229
    assert difference[..., 2:-2, 2:-2].max() < 2.5
    assert difference.mean() < 0.5
    # at the border, the graph's filter reads beyond the window's edge
    assert difference.max() < 12


TRIALS = 20000
BOUND = 5.5 / TRIALS**0.5


def test_photometric_draws_are_torchvisions() -> None:
    from torchvision.transforms import ColorJitter

    recipe = RECIPES["hp"]
    drawn = photometric.draw_photometric(TRIALS, recipe, rng_of(TRIALS, purpose="photometric"))
    jittered = drawn.brightness != 1
    assert abs(jittered.double().mean() - 0.8) < BOUND * 0.4
    for coin, probability in ((drawn.gray, 0.2), (drawn.sigma > 0, 0.5)):
        assert abs(coin.double().mean() - probability) < BOUND * 0.5
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(4000)
    ]
    names = ("brightness", "contrast", "saturation", "hue")
    for place, name in enumerate(names, start=1):
        ours = getattr(drawn, name)[jittered].double()
        reference = torch.tensor([parameters[place] for parameters in theirs]).double()
        spread = float(reference.std())
        error = 5.5 * spread * (1 / len(reference) + 1 / len(ours)) ** 0.5
        assert abs(ours.mean() - reference.mean()) < error, name
        assert abs(ours.std() - spread) < error, name
        assert abs(ours.min() - reference.min()) < 0.01 * spread * 4
        assert abs(ours.max() - reference.max()) < 0.01 * spread * 4
    together = torch.stack([getattr(drawn, name)[jittered] for name in names])
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 1.2 * BOUND
    # all 24 orders are equally frequent, as from torch.randperm
    number = (drawn.order * torch.tensor([64, 16, 4, 1])).sum(1)
    seen = number.bincount()
    seen = seen[seen > 0].double()
    assert len(seen) == 24
    assert (seen / TRIALS - 1 / 24).abs().max() < BOUND * (1 / 24) ** 0.5
    sigma = drawn.sigma[drawn.sigma > 0]
    assert abs(sigma.mean() - 1.05) < 0.02
    assert abs(sigma.std() - 1.9 / 12**0.5) < 0.02
    assert (sigma.min() < 0.11) & (sigma.max() > 1.99)
    assert sigma.min() >= 0.1


def test_a_draw_without_width_is_that_number() -> None:
    recipe = dataclasses.replace(
        RECIPES["none"], jitter_probability=1.0, brightness=0.0, hue=0.0, soft_blur_sigma=(1.5, 1.5)
    )
    drawn = photometric.draw_photometric(200, recipe, rng_of(200))
    assert (drawn.brightness == 1).all()
    assert (drawn.hue == 0).all()
    assert set(drawn.sigma.tolist()) == {0.0, 1.5}
