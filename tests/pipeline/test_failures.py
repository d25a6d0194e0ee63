"""Messages for DALI's errors blame a shard only for errors that a shard can cause."""

import pytest

from pipeline.failures import explain


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
