"""CPU threads of a worker."""

from collections.abc import Iterator

import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch

from precompute.decode import decode
from precompute.estimators import ScdaOptions, SpectralOptions
from precompute.reencode import Resize, check
from precompute.sources import SourceImage
from precompute.threads import limit_torch_threads, use_threads
from tests.conftest import encode, noise


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = ndd.get_num_threads()
    yield
    use_threads(before)


@pytest.mark.parametrize(("device", "of_torch"), [("cpu", 3), ("cuda", 1)])
def test_a_network_on_a_gpu_leaves_torch_one_thread(device: str, of_torch: int) -> None:
    use_threads(3)
    estimator = ScdaOptions("squeezenet1_1", "random").build("cpu")
    estimator.device = device  # type: ignore[misc]
    limit_torch_threads(estimator)
    assert torch.get_num_threads() == of_torch
    assert ndd.get_num_threads() == 3


def test_an_estimator_that_is_not_known_to_use_a_gpu_keeps_its_threads() -> None:
    use_threads(3)
    limit_torch_threads(SpectralOptions().build())
    assert torch.get_num_threads() == 3


def test_images_decode_after_any_change_of_the_number_of_threads() -> None:
    """By fewer threads than before DALI's decoder waited forever, by more it damaged memory."""
    images = [
        check(SourceImage(f"k{i}", f"{i}", 0), encode(noise(i)), {}, Resize()) for i in range(4)
    ]
    for threads in (4, 2, 8, 1, 3):
        use_threads(threads)
        good, _, rejects = decode(images)
        assert (len(good), rejects) == (4, [])
