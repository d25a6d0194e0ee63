"""One process or many, with the same code: joins what `torchrun` started, else is rank 0 of 1.

Collectives on CPU tensors go through gloo and on CUDA tensors through nccl. Whatever a person can
mend is raised on every rank at once (`together`), so that no rank waits for one that has left.
"""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.devices import device_of
from pipeline.draws import to_device
from schemas import UserError

SILENCE = re.compile(r"gloo|timed? ?out|[Cc]onnection (closed|reset)")
HOST_FULL = "DefaultCPUAllocator: can't allocate memory"
GRACE = 5.0
"""Seconds in which every rank that is alive notices that another is not."""


@contextmanager
def session(timeout: int = 600) -> Iterator[None]:
    """Join the processes of `torchrun` (RANK is set) or stay alone; share out the CPU cores.

    Args:
        timeout: seconds after which a rank that does not answer is taken for dead. It must be
            longer than one epoch's first batch, an evaluation and a checkpoint take.

    Raises:
        UserError: the processes cannot meet; memory is full; a rank died or was silent for too long
            (on the lowest of those that are left, the others exit with status 2).
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if "RANK" not in os.environ:
        refuse_strangers()
        with memory_is_enough():
            yield
        return
    end_with_parent()
    waits = timedelta(seconds=timeout)
    store, number, size = meet(waits)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("ranks", store), rank=number, world_size=size, timeout=waits
    )
    try:
        with memory_is_enough():
            yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors: its own name its source files, those of torch around it
        # say that a wait or an operation timed out
        if not isinstance(error, dist.DistError) and not SILENCE.search(str(error)):
            raise
        tell_silent_ranks(dist.PrefixStore("alive", store), number, size, timeout, error)
    # not in a finally: after an error the group may hang on ranks that have gone
    dist.destroy_process_group()


def meet(waits: timedelta) -> tuple[dist.Store, int, int]:
    """A store that all processes share, this one's rank, and their number.

    Raises:
        UserError: the port is taken, or not all came in time.
    """
    try:
        return next(dist.rendezvous("env://", timeout=waits))
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        taken = "EADDRINUSE" in str(error)
        what = "the port is taken by another program" if taken else str(error).splitlines()[0]
        raise UserError(
            f"the processes cannot meet at {place}: {what}; choose another --master-port, or let "
            "torchrun find one: --standalone, on one machine"
        ) from error


def refuse_strangers() -> None:
    """Raises UserError where srun started several processes, which know nothing of each other."""
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if count > 1:
        raise UserError(
            f"srun started {count} processes that do not know of each other: let it start torchrun "
            "once a node (--ntasks-per-node 1), as examples/slurm.sh does"
        )


@contextmanager
def memory_is_enough() -> Iterator[None]:
    """Turn a full memory, of the GPU or of the host, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and HOST_FULL not in str(error):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        raise UserError(
            f"{where} is out of memory{f' ({asked[1]} more were asked for)' if asked else ''}: "
            "--accumulate 2, 4 ... works through the same batch in parts; a smaller --batch-size "
            "or --crop-size needs less too"
        ) from error


def tell_silent_ranks(
    store: dist.Store, number: int, size: int, timeout: int, error: Exception
) -> None:
    """End this rank; the lowest one alive says which others are not."""
    store.set(str(number), "alive")
    time.sleep(GRACE)
    silent = [other for other in range(size) if not store.check([str(other)])]
    lowest = min(other for other in range(size) if other not in silent)
    if number == lowest:
        whom = f"rank {', '.join(map(str, silent))}" if silent else "the network"
        raise UserError(
            f"{whom} of {size} processes died or was silent for {timeout} s (--rank-timeout); the "
            "same command goes on from the last checkpoint\n"
            f"({str(error).splitlines()[0]})"
        ) from error
    raise SystemExit(2)


def end_with_parent() -> None:
    """Get SIGTERM when torchrun is killed: without it, its workers would go on for themselves."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we asked
        raise SystemExit(2)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """`auto` | `cpu` | `cuda` -> this rank's device: on CUDA, GPU number LOCAL_RANK."""
    if device_of(name).type == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: this machine has "
            f"{torch.cuda.device_count()}; start no more processes than GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Rows of every rank in rank order, without gradient: (N, ...) -> (world size * N, ...)."""
    if world_size() == 1:
        return x
    rows = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """`all_gather` where ranks have different numbers of rows, each at least one."""
    counts = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    most = max(counts)
    padded = torch.cat([x, x[:1].expand(most - len(x), *x.shape[1:])])
    rows = all_gather(padded).split(most)
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


class GatherWithGradient(torch.autograd.Function):
    """`all_gather` whose backward pass sums, for each rank's rows, the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class SumWithGradient(torch.autograd.Function):
    """The sum over the ranks; its backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of every rank in rank order, with gradient: (N, ...) -> (world size * N, ...)."""
    return x if world_size() == 1 else GatherWithGradient.apply(x)


@torch.no_grad()
def all_mean(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def mean_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for a bucket of gradients: their means over the ranks, summed rank after rank.

    DDP deals gradients into other buckets after a process's first step, and the order in which
    gloo's own reduction adds up the ranks depends on where in its bucket a number lies. Here each
    rank sums a share of the bucket; as much is sent as there.
    """
    flat, size = bucket.buffer(), world_size()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    shares = torch.empty_like(padded)  # this rank's share, as each rank has it
    dist.all_to_all_single(shares, padded)
    mean, *others = shares.view(size, -1).unbind()
    for other in others:
        mean += other
    mean /= size
    dist.all_gather_into_tensor(padded, mean.contiguous())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(padded[: len(flat)])
    return done


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. For small things: it is pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shuffle(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Deal the images of all ranks anew: batch statistics then do not tell which belong together.

    Args:
        x: this rank's images, (N, C, H, W), the same N on every rank.
        generator: on the CPU and in the same state on every rank, so that all draw one permutation.

    Returns:
        This rank's share (N, C, H, W) of the permuted images, channels_last, and the function that
        brings results (N, D) computed from such a share back to the rows of `x`. With one rank
        there is nothing to deal: both leave their argument as it is, and nothing is drawn.
    """
    if world_size() == 1:
        return x, lambda y: y
    order = torch.randperm(world_size() * len(x), generator=generator)
    share = to_device(order.view(world_size(), -1)[rank()], x.device)
    origin = to_device(order.argsort().view(world_size(), -1)[rank()], x.device)
    rows = all_gather(x.permute(0, 2, 3, 1))  # NHWC: no copy when x is channels_last
    return rows[share].permute(0, 3, 1, 2), lambda y: all_gather(y)[origin]


def fail(message: str) -> None:
    """Stop on every rank; called by all of them, rank 0 speaks."""
    if is_main():
        raise UserError(message)
    raise SystemExit(2)


@contextmanager
def together() -> Iterator[None]:
    """A section that fails on all ranks when it fails on one. Every rank must enter it.

    Covers UserError and OSError; anything else is a defect and ends its process at once, upon which
    torchrun ends the others.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        raise  # the reader of our output has left
    except OSError as error:
        message = f"{error.filename or 'file system'}: {error.strerror or error}"
    messages = gather_objects(message)
    failed = [r for r, text in enumerate(messages) if text is not None]
    if failed:
        where = "" if len(failed) == len(messages) else f"rank {failed[0]}: "
        fail(where + messages[failed[0]])
