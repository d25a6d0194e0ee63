"""Distinguish errors of a device or of memory from errors of the data, by their text.

DALI and PyTorch raise the same RuntimeError for an image that does not decode, for a GPU that fails
and for memory that runs out. Only the text tells them apart. The difference matters: damaged data
concerns one sample or one shard, the other two concern the machine, so neither may count as a
damaged image (`precompute`) or a damaged shard (`pipeline`).
"""

import re
from typing import Literal

MEMORY = re.compile(
    "|".join(
        [
            r"bad_alloc",
            r"out of memory",  # PyTorch, cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY
            r"memory allocation",
            r"allocation failed",  # DALI: CUDA allocation failed
            r"can(?:'t|not) allocate",  # DALI: Can't allocate N bytes on device D / on host
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY",
            r"\w+_STATUS_(?:ALLOC_FAILED|ALLOCATOR_FAILURE)",  # cuBLAS, cuDNN, nvJPEG
            r"CUDA runtime failure:? '#2'",  # cudaErrorMemoryAllocation
            # nvimgcodec.h: ALLOCATOR_FAILURE of the library (5) and of one of its decoders (15)
            r"nvImageCodec failure: '#(?:5|15)'",
        ]
    ),
    re.IGNORECASE,
)

DEVICE = re.compile(
    "|".join(
        [
            r"cudaError(?!_t\b)\w+|CUDA_ERROR_\w+",
            r"CUDA (?:runtime|driver|kernel|call|error|failure|initialization)",
            r"CUDA-capable (?:GPU|device)",
            r"(?:CUBLAS|CUDNN|CUFFT|NPP|NVML)_(?:STATUS|CUDA|ERROR)\w*",
            r"illegal memory access|unspecified launch failure|device-side assert",
            r"misaligned address|uncorrectable ECC|GPU is lost|NVIDIA driver",
            r"nvImageCodec failure: '#21'",  # nvimgcodec.h: EXTENSION_CUDA_CALL_ERROR
        ]
    ),
    re.IGNORECASE,
)


def classify_error(message: str) -> Literal["memory", "device", "data"]:
    """Classify an error of DALI or PyTorch by its whole text.

    `memory`: the host or a GPU is out of memory. `device`: a GPU or its driver fails. `data`:
    anything else, including a damaged image. `data` does not prove that the device works: a decoder
    may fail without giving a reason.
    """
    if MEMORY.search(message):
        return "memory"
    return "device" if DEVICE.search(message) else "data"


def first_line(message: str) -> str:
    """Return the part of a long DALI or PyTorch error that states the reason, as one line."""
    cause = message.partition("encountered:")[2].strip() or message.strip()
    lines = [line.strip() for line in cause.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # CUDA runtime API error cudaError... (700):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else "no reason given"
