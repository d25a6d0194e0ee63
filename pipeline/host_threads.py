"""The pool of threads that make views on the host, each from a few rows of a batch."""

import os
import threading
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
    # also fixes the number of the calling thread, before the pool's threads set another one
    threads = torch.get_num_threads()
    # for the whole process: OpenCV would start threads of its own for views above 256 pixels
    cv2.setNumThreads(1)
    return ThreadPoolExecutor(devices.count_cpu_threads(), "views", use_one_thread, (threads,))


def use_one_thread(later: int) -> None:
    """Give PyTorch one thread in the calling thread, and `later` in threads that start later.

    A thread takes, at its first query, the number that any thread has set last.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)
    last = threading.Thread(target=torch.set_num_threads, args=(later,))
    last.start()
    last.join()


# a forked process has the pool without its threads, and would wait for them forever
os.register_at_fork(after_in_child=get_threads.cache_clear)
