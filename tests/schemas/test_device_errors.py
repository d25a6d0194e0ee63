"""Test that errors of a device, of memory and of the data are distinguished by their text."""

import pytest

from schemas.device_errors import classify_error, first_line

# The wording of DALI 2.4 (strings of its library), PyTorch 2.15 and nvimgcodec.h.
MEMORY = [
    "CUDA allocation failed",
    "Can't allocate 1234567 bytes on device 0.",
    "Can't allocate 1234567 bytes on host.",
    "Error in CPU operator `nvidia.dali.fn.decoders.image`, encountered:\nstd::bad_alloc",
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "CUDA Runtime failure: '#2'",
    "nvImageCodec failure: '#5'",
    "nvImageCodec failure: '#15'",
    "[Errno 12] Cannot allocate memory",
]
DEVICE = [
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access",
    "CUDA driver API error CUDA_ERROR_LAUNCH_FAILED (719):\nunspecified launch failure",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: device-side assert triggered",
    "CUDA error: all CUDA-capable devices are busy or unavailable",
    "CUDA driver version is insufficient for CUDA runtime version",
    "Unhandled CUDA error: cudaErrorECCUncorrectable",
    "The pipeline requires a CUDA-capable GPU but CUDA runtime initialization failed.",
    "CUDA Runtime failure: '#999'",
    "Found no NVIDIA driver on your system",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "nvImageCodec failure: '#21'",
]
DATA = [
    "nvImageCodec failure: '#3'",
    "nvImageCodec failure: '#4'",
    "nvImageCodec failure: '#17'",
    "Failed to decode sample #0 : ",
    "nvjpeg_cuda_decoder: could not parse the stream",
    "Could not decode jpeg code stream - Premature end of JPEG data",
    "File shards/000001.tar: unexpected end of file",
    "",
]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (text, kind)
        for kind, texts in zip(("memory", "device", "data"), (MEMORY, DEVICE, DATA), strict=True)
        for text in texts
    ],
)
def test_an_error_is_classified_by_its_text(message: str, kind: str) -> None:
    assert classify_error(message) == kind


def test_the_reason_is_one_line() -> None:
    assert first_line(DEVICE[0]) == (
        "CUDA runtime API error cudaErrorIllegalAddress (700): an illegal memory access"
    )
    operator = "Error in CPU operator `decoders.image`,\nencountered:\n\nit broke\nat frame 3"
    assert first_line(operator) == "it broke"
    assert first_line("\n") == "no reason given"
