"""Buffers that are used again once nothing refers to their contents."""

import weakref
from collections import deque

import numpy as np

HEADROOM = 1.25
"""Capacity of a new buffer divided by the size first requested, so that it also serves slightly
larger requests (our choice)."""


class BufferPool:
    """Hands out buffers, and takes each back when its array and all views of it are gone.

    New memory is slow: the kernel clears each page and maps it on its first use, which takes longer
    than copying a cached file into memory that is mapped already.
    """

    def __init__(self) -> None:
        # deques, because their methods are atomic: an array may be released by any thread
        self._free: deque[bytearray] = deque()

    def take(self, size: int) -> np.ndarray:
        """Return an array of `size` bytes, (size,) uint8, with arbitrary contents."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray()
        if len(memory) < size:
            memory = bytearray(int(HEADROOM * size))
        array = np.frombuffer(memory, np.uint8, size)
        # Slices, and DALI and PyTorch, which read in place, keep `array` alive; so the memory is
        # reused only when none of them needs it.
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
