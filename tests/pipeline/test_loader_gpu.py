"""The loader's device checks (`bench.gpu_loader`), on a GPU if there is one, else on a CPU."""

from dataclasses import replace

import pytest
import torch

from bench import gpu_loader

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def photos_of_all_formats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gpu_loader.write_photos(tmp_path_factory.mktemp("formats") / "data", 28)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", gpu_loader.CHECKS)
def test_check_passes(name: str, device: str, photos_of_all_formats: str) -> None:
    details = gpu_loader.CHECKS[name](photos_of_all_formats, device, 7, 56)
    assert bool(details) == (name != "no waits" or device == "cuda")


def test_a_batch_that_differs_is_noticed(photos_of_all_formats: str) -> None:
    (batch,) = gpu_loader.take_and_close(
        gpu_loader.views_of(photos_of_all_formats, "cpu", 7, 56), 1
    )
    assert gpu_loader.differences(batch, batch) == []
    assert batch.query_photometric is not None
    parameters = replace(batch.query_photometric, gray=~batch.query_photometric.gray)
    other = replace(batch, query=batch.query + 1, query_photometric=parameters, sample_keys=[])
    names = ["query", "query_photometric", "sample_keys"]
    assert gpu_loader.differences(batch, other) == names
    with pytest.raises(AssertionError, match="step 0 differs in label"):
        gpu_loader.expect_equal([batch], [replace(batch, label=torch.zeros(1))])
