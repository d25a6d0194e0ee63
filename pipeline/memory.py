"""Memory of a CPU's batches, kept from step to step.

A batch's images are 20 MB each at 32 samples. Fresh memory costs a page fault for each 4 kB, which
takes as long as all the jitter of a view; glibc hands such pieces back to the kernel at each step,
or not, by a history that nobody controls. So images are used again once nobody holds them, and what
is freed in between stays with the process.
"""

import ctypes
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor

KEPT = 8
"""Images of a batch that are kept: those of two steps, for query, key and two hard negatives."""

# names and values of glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


@cache
def keep_freed_memory() -> None:
    """Tell glibc, once a process, to keep what is freed. Another C library is left as it is."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # its largest
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_TOP_PAD, 1 << 26)


_probe = [np.empty(0)]
FREE = sys.getrefcount(_probe[0])
"""References to an array that only a list holds."""


class Buffers:
    """Hands out uninitialised images; memory that nobody holds any more is handed out again."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def empty(self, count: int, side: int) -> Tensor:
        """(count, 3, side, side) float32 on the CPU, channels_last."""
        size = count * side * side * 3
        for place in range(len(self._arrays)):
            if len(self._arrays[place]) == size and sys.getrefcount(self._arrays[place]) == FREE:
                array = self._arrays.pop(place)
                break
        else:
            array = np.empty(size, np.float32)
        self._arrays = [*self._arrays, array][-KEPT:]
        # the tensor and all its views hold the array
        return torch.from_numpy(array).view(count, side, side, 3).permute(0, 3, 1, 2)
