"""Collective operations; a single process runs the same code as rank 0 of 1.

Collectives on CPU tensors go through gloo and on CUDA tensors through nccl. Errors that the user
can fix are raised on all ranks at once (`raise_on_all_ranks`), so no rank waits for one that has
left.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.devices import to_device
from schemas import UserError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Gather the rows of all ranks in rank order, no gradient: (N, ...) -> (ranks * N, ...)."""
    if world_size() == 1:
        return x
    rows = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(rows, x.contiguous())
    return rows


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """Gather as `all_gather` when ranks have different numbers of rows, each at least one."""
    counts = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    most = max(counts)
    padded = torch.cat([x, x[:1].expand(most - len(x), *x.shape[1:])])
    rows = all_gather(padded).split(most)
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


class GatherWithGradient(torch.autograd.Function):
    """`all_gather` with a backward pass: each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


class SumWithGradient(torch.autograd.Function):
    """Sum over the ranks; the backward pass sums the gradients of all ranks."""

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
    """Gather the rows of all ranks in rank order, with gradient: (N, ...) -> (ranks * N, ...)."""
    return x if world_size() == 1 else GatherWithGradient.apply(x)


@torch.no_grad()
def all_mean_(x: Tensor) -> Tensor:
    """Replace `x` by its mean over the ranks, bitwise equal on every rank; return it."""
    if world_size() > 1:
        dist.all_reduce(x)
        x /= world_size()
    return x


def average_in_rank_order(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks, adding rank after rank: a DDP hook.

    DDP assigns gradients to different buckets after the first step of a process, and the order in
    which gloo's own reduction adds the ranks depends on the position of a number in its bucket.
    Here each rank sums one share of the bucket, which sends as much data as gloo does.
    """
    flat, size = bucket.buffer(), world_size()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    shares = torch.empty_like(padded)  # this rank's share, as each rank has it
    dist.all_to_all_single(shares, padded)
    mean, *other_shares = shares.view(size, -1).unbind()
    for share in other_shares:
        mean += share
    mean /= size
    dist.all_gather_into_tensor(padded, mean.contiguous())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(padded[: len(flat)])
    return future


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order on every rank. Keep small: they are pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shuffle_across_ranks(
    x: Tensor, generator: torch.Generator
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Permute the images of all ranks, so batch statistics do not reveal positive pairs.

    Every rank knows the permutation on the host, so each image is sent once, to the rank that
    needs it, and under autocast in the precision to which the first convolution casts it.

    Args:
        x: this rank's images, (N, C, H, W), the same N on every rank.
        generator: a CPU generator in the same state on every rank, so all draw one permutation.

    Returns:
        This rank's share (N, C, H, W) of the permuted images, channels_last, and a function that
        brings results (N, D) computed from such a share back to the order of `x`. With one rank
        nothing is permuted and nothing is drawn: both return their argument unchanged.
    """
    if world_size() == 1:
        return x, lambda y: y
    order = torch.randperm(world_size() * len(x), generator=generator)
    origin = to_device(order.argsort().view(world_size(), -1)[rank()], x.device)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = exchange_rows(x.permute(0, 2, 3, 1), order)  # NHWC: no copy when x is channels_last
    return rows.permute(0, 3, 1, 2), lambda y: all_gather(y)[origin]


@torch.no_grad()
def exchange_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return this rank's share of the rows of all ranks in a new order, by one all-to-all.

    Args:
        x: this rank's rows, (N, ...), the same N on every rank.
        order: (world size * N,) int64 permutation on the CPU, the same on every rank: position `i`
            of the new order takes row `order[i]` of the rows in rank order.

    Returns:
        (N, ...): the rows at positions `rank * N` to `rank * N + N - 1`, bit for bit.
    """
    size, count = world_size(), len(x)
    sources = order.view(size, count)  # row r: the rows that rank r receives
    # rank r receives from the ranks in turn, and from each in the order of r's positions
    outgoing = [needed[needed // count == rank()] - rank() * count for needed in sources]
    arrival = (sources[rank()] // count).argsort(stable=True)  # positions in order of arrival
    received = torch.bincount(sources[rank()] // count, minlength=size).tolist()
    sent = x[to_device(torch.cat(outgoing), x.device)].contiguous()
    rows = torch.empty_like(sent)
    dist.all_to_all_single(rows, sent, received, [len(part) for part in outgoing])
    return rows[to_device(arrival.argsort(), x.device)]


def exit_all_ranks(message: str) -> None:
    """Stop on every rank, which must all call it; rank 0 raises UserError with the message."""
    if is_main():
        raise UserError(message)
    raise SystemExit(2)


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Fail on all ranks if this block fails on one. Every rank must enter it.

    Covers UserError and OSError; any other exception is a bug and ends its process at once, upon
    which torchrun ends the others.
    """
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        raise  # the reader of this program's output has left
    except OSError as error:
        message = f"{error.filename or 'file system'}: {error.strerror or error}"
    messages = gather_objects(message)
    failed = [r for r, text in enumerate(messages) if text is not None]
    if failed:
        where = "" if len(failed) == len(messages) else f"rank {failed[0]}: "
        exit_all_ranks(where + messages[failed[0]])
