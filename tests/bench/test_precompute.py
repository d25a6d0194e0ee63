"""The rates of the precompute benchmark."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import precompute
from precompute.estimators import ScdaOptions
from tests.conftest import encode, noise


@pytest.mark.parametrize("images", [3, 40])
def test_the_rate_of_the_backbone_counts_the_images_that_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    """Its clock runs one second; at most 32 images are prepared."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        path = tmp_path / "photos" / f"{number}.jpg"
        path.write_bytes(encode(noise(number, 40, 40), "JPEG"))
    monkeypatch.setattr(
        precompute, "time", SimpleNamespace(perf_counter=iter(np.arange(2.0)).__next__)
    )
    options = precompute.Options(root=str(tmp_path), images=images)
    scda = ScdaOptions("squeezenet1_1", "random", areas=(1.0,), size=64, precision="fp32")
    rate = precompute.EstimatorBench(options, scda, tmp_path).measure_backbone()
    assert rate == min(images, 32)
