"""The pool of threads that make views on the host, each from a few rows of a batch."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import cv2
import torch

from pipeline import devices

PART = 8
"""Views that a thread works on at a time: 5 MB at 224 pixels, which fits into its caches."""


def split_rows(size: int) -> list[slice]:
    """Split the rows of a batch into the parts that a thread works on at a time."""
    return [slice(start, min(start + PART, size)) for start in range(0, size, PART)]


@cache
def get_threads() -> ThreadPoolExecutor:
    """Return the pool that works on parts of a batch; each of its threads uses one core."""
    # A thread's intra-op thread count is fixed at its first query, to the value last set by any
    # thread. Query it here, before the pool's threads set it to 1.
    torch.get_num_threads()
    # for the whole process: OpenCV would start threads of its own for views above 256 pixels
    cv2.setNumThreads(1)
    return ThreadPoolExecutor(devices.count_cpu_threads(), "views", torch.set_num_threads, (1,))


# a forked process has the pool without its threads, and would wait for them forever
os.register_at_fork(after_in_child=get_threads.cache_clear)
