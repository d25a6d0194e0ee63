"""Test how much of a float map the 8 bits of a SaliencyMap keep."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from schemas import SaliencyMap


def relaxed_foreground(grid: np.ndarray) -> np.ndarray:
    """Apply the rule as the poster writes it: A >= mean, or within 0.6 population std of it."""
    grid = grid.astype(np.float64)
    mean = sum(grid.flat) / grid.size
    std = (sum((value - mean) ** 2 for value in grid.flat) / grid.size) ** 0.5
    return (grid >= mean) | (abs(grid - mean) <= 0.6 * std)


def read_back(values: np.ndarray) -> np.ndarray:
    quantized = SaliencyMap.quantize(values)
    return SaliencyMap.from_png(quantized.to_png(), quantized.minimum, quantized.maximum).values()


@pytest.mark.parametrize("spread", ["normal", "exponential", "blob"])
def test_foreground_survives_the_round_trip(spread: str) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    kept = []
    for _ in range(100):
        if spread == "blob":
            values = np.exp(-((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2) * 3)
            values = values + rng.normal(0, 0.02, values.shape)
        else:
            values = getattr(rng, spread)(size=(28, 28))
        values = (values * rng.uniform(0.01, 1e4) + rng.normal()).astype(np.float32)
        kept.append((relaxed_foreground(read_back(values)) == relaxed_foreground(values)).mean())
    assert np.mean(kept) >= 0.99


def test_values_come_back_within_half_a_step() -> None:
    values = np.random.default_rng(1).normal(5, 100, (28, 28)).astype(np.float32)
    step = (values.max() - values.min()) / 255
    assert abs(read_back(values) - values).max() <= step / 2 * 1.001


def test_quantizing_what_was_read_back_changes_nothing() -> None:
    first = SaliencyMap.quantize(np.random.default_rng(2).normal(size=(28, 28)))
    again = SaliencyMap.quantize(first.values())
    assert (again.grid == first.grid).all()
    assert (again.minimum, again.maximum) == (first.minimum, first.maximum)


def test_a_constant_map_stays_constant() -> None:
    values = read_back(np.full((28, 28), 7.5, np.float32))
    assert (values == 7.5).all()
    assert relaxed_foreground(values).all()


def test_a_range_beyond_float32_does_not_overflow() -> None:
    values = np.zeros((2, 2), np.float32)
    values[0, 0], values[1, 1] = 3e38, -3e38
    np.testing.assert_allclose(read_back(values), values, rtol=1e-6, atol=6e38 / 510)


@pytest.mark.parametrize("levels", [1, 2, 256])
def test_the_share_of_the_foreground_is_that_of_the_rule(levels: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        grid = rng.integers(0, levels, (28, 28), np.uint8)
        share = SaliencyMap(grid, 0.0, 1.0).foreground()
        assert share == relaxed_foreground(grid).mean()


@pytest.mark.parametrize(
    "values", [np.zeros((28, 27)), np.zeros(28), np.full((2, 2), np.nan), np.zeros((0, 0))]
)
def test_invalid_maps_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="saliency map must be"):
        SaliencyMap.quantize(values)


def test_every_flipped_byte_of_a_png_is_noticed() -> None:
    quantized = SaliencyMap.quantize(np.random.default_rng(3).normal(size=(28, 28)))
    png = quantized.to_png()
    for place in range(len(png)):
        damaged = png[:place] + bytes([png[place] ^ 0x40]) + png[place + 1 :]
        with pytest.raises(ValueError, match="PNG"):
            SaliencyMap.from_png(damaged, 0.0, 1.0)


@pytest.mark.parametrize("side", [28, 2**24], ids=["no pixels", "a gigantic size"])
def test_an_odd_png_with_right_checksums_is_refused(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in [(b"IHDR", header), (b"IEND", b"")]:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + checksum
    with pytest.raises(ValueError, match="not a sound PNG"):
        SaliencyMap.from_png(png, 0.0, 1.0)


def test_memory_that_runs_out_blames_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> None:
        raise MemoryError

    png = SaliencyMap.quantize(np.eye(28)).to_png()
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        SaliencyMap.from_png(png, 0.0, 1.0)


def test_a_png_of_another_kind_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="grayscale"):
        SaliencyMap.from_png(buffer.getvalue(), 0.0, 1.0)
