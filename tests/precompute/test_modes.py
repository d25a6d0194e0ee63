"""Tests of Pillow's modes: a picture looks the same whether it is shrunk, re-encoded or kept."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from precompute.decode import decode
from precompute.pixels import to_rgb
from precompute.reencode import EncodedImage, Resize, check
from precompute.sources import SourceImage
from tests.conftest import noise

SIDE = 32
PIXELS = noise(0, 64, 80)
GRAY = PIXELS[..., 0]
COLOR = Image.fromarray(PIXELS)


def lab() -> Image.Image:
    profiles = [ImageCms.createProfile(space) for space in ("sRGB", "LAB")]
    converted = ImageCms.profileToProfile(COLOR, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def transparent_palette() -> Image.Image:
    picture = COLOR.convert("P")
    picture.info["transparency"] = 0
    return picture


L = COLOR.convert("L")
SIXTEEN = Image.fromarray(GRAY.astype(np.uint16) * 257)
MODES = {
    # picture, a format that keeps its mode, and the expected RGB pixels
    "I;16 png": (SIXTEEN, "PNG", GRAY),
    "I;16 tiff": (SIXTEEN, "TIFF", GRAY),
    "I;16 jpeg 2000": (SIXTEEN, "JPEG2000", GRAY),
    "I of 16 bits": (Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF", GRAY),
    "I of 8 bits": (Image.fromarray(GRAY.astype(np.int32)), "TIFF", GRAY),
    "I pgm": (Image.fromarray(GRAY.astype(np.int32) * 257), "PPM", GRAY),
    "F of 0 .. 1": (Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF", GRAY),
    "F of 0 .. 255": (Image.fromarray(GRAY.astype(np.float32)), "TIFF", GRAY),
    "F pfm": (Image.fromarray(GRAY.astype(np.float32)), "PPM", GRAY),
    "LA": (COLOR.convert("LA"), "PNG", L),
    "LA tiff": (COLOR.convert("LA"), "TIFF", L),
    "LA jpeg 2000": (COLOR.convert("LA"), "JPEG2000", L),
    "PA": (COLOR.convert("P").convert("PA"), "TIFF", COLOR.convert("P").convert("RGB")),
    "P with transparency": (transparent_palette(), "PNG", COLOR.convert("P").convert("RGB")),
    "RGBA": (COLOR.convert("RGBA"), "PNG", COLOR),
    "CMYK": (COLOR.convert("CMYK"), "TIFF", COLOR),
    "CMYK jpeg": (COLOR.convert("CMYK"), "JPEG", COLOR),
    "CMYK jpeg 2000": (COLOR.convert("CMYK"), "JPEG2000", COLOR),
    "YCbCr": (COLOR.convert("YCbCr"), "TIFF", COLOR),
    "1": (COLOR.convert("1"), "PNG", COLOR.convert("1")),
    "1 tiff": (COLOR.convert("1"), "TIFF", COLOR.convert("1")),
    "L*a*b*": (lab(), "TIFF", COLOR),
}


def stored(content: bytes, resize: Resize) -> tuple[EncodedImage, np.ndarray]:
    """Return the image that is written, and its pixels as decoded by the loader's decoder."""
    encoded = check(SourceImage("key", "a/b", 0), content, {}, resize)
    good, pixels, rejects = decode([encoded])
    assert not rejects
    return good[0], np.asarray(pixels.tensors[0]).astype(int)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("resize", [Resize(), Resize(SIDE, quality=95)], ids=["kept", "resized"])
def test_the_picture_is_shown(name: str, resize: Resize) -> None:
    picture, image_format, shown = MODES[name]
    buffer = io.BytesIO()
    picture.save(buffer, image_format)
    encoded, pixels = stored(buffer.getvalue(), resize)
    expected = Image.fromarray(shown) if isinstance(shown, np.ndarray) else shown
    expected = expected.convert("RGB")
    if resize.short_side:
        expected = expected.resize((40, SIDE), Image.Resampling.BICUBIC)
        assert encoded.reencoded
    else:
        assert encoded.reencoded == (encoded.content != buffer.getvalue())
    tolerance = 6 if resize.short_side or image_format == "JPEG" else 2
    assert abs(pixels - np.asarray(expected, int)).mean() < tolerance


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([[-2.0, 0.0, 2.0]], [0, 128, 255], id="below zero: stretched"),
        pytest.param([[0.0, 1e6, 5e5]], [0, 255, 128], id="above all whites: stretched"),
        pytest.param([[np.nan, 0.0, 1.0]], [0, 0, 255], id="not a number"),
        pytest.param([[np.inf, 0.0, 1.0]], [255, 0, 255], id="infinite"),
        pytest.param([[np.nan, np.nan, np.nan]], [0, 0, 0], id="nothing but not a number"),
        pytest.param([[7.0, 7.0, 7.0]], [7, 7, 7], id="all alike"),
        pytest.param([[-7.0, -7.0, -7.0]], [0, 0, 0], id="all alike, below zero"),
    ],
)
def test_floats_have_no_white_of_their_own(values: list, expected: list) -> None:
    picture = Image.fromarray(np.array(values, np.float32))
    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["La", "RGBa", "RGBX", "HSV", "I;16B", "I;16L", "I;16N"])
def test_modes_that_no_file_has_are_converted_too(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"
