"""CPU threads of a worker."""

import nvidia.dali.experimental.dynamic as ndd
import torch

from precompute.estimators import Estimator


def use_threads(threads: int) -> None:
    """Give DALI and PyTorch this many CPU threads each; call it before the estimator is built.

    DALI caches its operators, each built for the number of threads of its time. Run by fewer, its
    decoder waits forever; run by more, it writes outside its memory (DALI 2.4). Therefore, the
    operators that the calling thread has used so far are dropped.
    """
    torch.set_num_threads(threads)
    ndd.set_num_threads(threads)
    ndd.EvalContext.current()._purge_operator_cache()


def limit_torch_threads(estimator: Estimator) -> None:
    """Give PyTorch one CPU thread if the estimator's network is on a GPU.

    The remaining work on the CPU is small (pasting and averaging maps), and PyTorch's threads spin
    while they wait for each other: on a machine with an H200, a worker with 16 threads took 7.3 CPU
    ms per image, and one with a single thread 2.2 (bench/results/gpu-h200.txt).
    """
    if estimator.network_on_gpu:
        torch.set_num_threads(1)
