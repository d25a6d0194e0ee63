"""Contact sheets of images with extreme shapes are written without errors."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.contact_sheet import TILE, fit_into_tile, fit_letterbox
from pipeline.preview import overlay_saliency, write_preview
from schemas import Sample, write_dataset
from tests.conftest import encode
from tests.pipeline.conftest import small

SHAPES = [(500, 1), (1, 500), (1, 1), (30, 20_000), (20_000, 2), (2, 1), (1, 449), (225, 1)]
"""Height and width of the images."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_picture_of_any_shape_fits_into_a_tile(shape):
    height, width = shape
    image = Image.new("RGB", (width, height), (9, 99, 9))
    fitted = fit_into_tile(image)
    assert max(fitted.size) == TILE
    assert min(fitted.size) >= 1
    tile, to_tile = fit_letterbox(image)
    assert tile.size == (TILE, TILE)
    for x, y in ((0, 0), (1, 1), (0.5, 1)):
        assert all(0 <= place < TILE for place in to_tile(x, y))
    assert (np.asarray(tile) == (9, 99, 9)).all(axis=2).any()
    assert overlay_saliency(fitted, Image.new("L", (28, 28), 128)).size == fitted.size


def test_common_shapes_keep_their_aspect_ratio():
    assert fit_into_tile(Image.new("RGB", (500, 375))).size == (224, 168)
    assert fit_into_tile(Image.new("RGB", (30, 60))).size == (112, 224)


def test_preview_handles_odd_shapes(tmp_path: Path):
    samples = [
        Sample(
            key=f"s{place}",
            image=encode(np.full((*shape, 3), 90, np.uint8), "PNG"),
            extension="png",
            saliency=np.zeros((28, 28), np.float32),
            label=-1,
            height=shape[0],
            width=shape[1],
        )
        for place, shape in enumerate(SHAPES)
    ]
    write_dataset(str(tmp_path / "d"), samples, name="odd")
    out = tmp_path / "sheet.png"
    rows = write_preview(str(tmp_path / "d"), small("hp"), out, samples=20)
    assert rows == len(SHAPES)
    with Image.open(out) as sheet:
        assert sheet.height > len(SHAPES) * TILE
