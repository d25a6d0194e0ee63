"""Messages for DALI's errors blame a shard only for errors that a shard can cause."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.failures import explain
from pipeline.shards import EncodedBatch


@pytest.mark.parametrize(
    "message",
    ["CUDA allocation failed", "Can't allocate 4096 bytes on device 0.", "std::bad_alloc"],
)
def test_out_of_memory_does_not_blame_a_shard(message: str) -> None:
    line = explain(f"Error in an operator, encountered:\n{message}", "out/d", [])
    assert line.startswith(f"out/d: DALI is out of memory ({message})")
    assert "copy the damaged shard again" not in line


def test_gpu_failure_does_not_blame_a_shard() -> None:
    message = "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access"
    line = explain(message, "out/d", [])
    assert line.startswith("the GPU failed (CUDA runtime API error cudaErrorIllegalAddress (700): ")
    assert "nvidia-smi" in line
    assert "copy the damaged shard again" not in line
    assert "\n" not in line


def test_anything_else_names_the_shard() -> None:
    line = explain("out/d/shards/000001.tar: unexpected end of file", "out/d", [])
    assert line.startswith("out/d: out/d/shards/000001.tar: ")
    assert "copy the damaged shard again" in line


def encode(side: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def test_a_large_image_before_the_damaged_one_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    images, maps = [encode(64), encode(8)[:45]], [encode(4)] * 2
    numbers = np.zeros(2, np.int64)
    names = ["large", "damaged"], ["d/shards/000000"] * 2
    batch = EncodedBatch(numbers, images, maps, numbers, numbers, numbers, *names)
    line = explain("Error in decoders.image: unexpected end", "d", [batch])
    assert line.startswith("d/shards/000000.tar: sample damaged: ")
