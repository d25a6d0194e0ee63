"""Threads of a worker on the CPU."""

import nvidia.dali.experimental.dynamic as ndd
import torch


def use_threads(threads: int, device: str) -> None:
    """Give DALI and PyTorch `threads` CPU threads each, PyTorch one if its network is on a GPU.

    What such a worker computes with PyTorch on the CPU is small (pasting and averaging maps), and
    PyTorch's threads spin while they wait for each other: without a limit, workers side by side on
    16 cores took turns at spinning (55 CPU ms an image with two workers on an H200).

    Args:
        threads: at least 1.
        device: the estimator's device, `cpu` or `cuda`.
    """
    torch.set_num_threads(threads if device == "cpu" else 1)
    ndd.set_num_threads(threads)
