"""Join the processes that `torchrun` started, or run alone; explain why that cannot be done."""

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from pipeline.devices import parse_device
from schemas import UserError

SILENCE = re.compile(r"gloo|timed? ?out|[Cc]onnection (closed|reset)")
HOST_FULL = "DefaultCPUAllocator: can't allocate memory"
GRACE = 5.0
"""Seconds within which every live rank notices that another one is dead."""
POLL = 0.05
"""Seconds between two polls of rank 0 for ranks that start (our choice)."""
NCCL_EXTRA = 60
"""Seconds that NCCL waits longer than gloo (our choice). NCCL's watchdog ends the process without
naming a rank; gloo raises an error, after which the store tells which rank is silent."""


Options = TypeVar("Options")


def parse_on_all_ranks(parse_options: Callable[[], Options]) -> Options:
    """Parse the command line on every rank; only the first of each machine prints help and errors.

    A file that an option names may be missing on one machine alone.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return parse_options()
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        try:
            return parse_options()
        except UserError as error:
            raise SystemExit(2) from error


@contextmanager
def join_process_group(timeout: int = 600, device: str = "auto") -> Iterator[None]:
    """Join the processes of `torchrun` (RANK is set) or run alone; divide the CPU cores.

    On GPUs each rank makes its own GPU the current one before anything else touches CUDA. A
    missing device is not an error here: `pick_device` reports it on every rank at once.

    Args:
        device: `auto`, `cpu` or `cuda`, as for `pick_device`. NCCL is joined unless it is cpu.
        timeout: seconds after which a rank that does not answer counts as dead. It must exceed the
            time of an epoch's first batch, of an evaluation and of a checkpoint.

    Raises:
        UserError: the processes cannot meet; memory is full; a rank died or was silent for too long
            (on the lowest of the remaining ranks, the others exit with status 2; on all of them if
            the store of the processes is gone too).
    """
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    # torch takes the number only when it first computes, and then the last that any thread set
    torch.get_num_threads()
    if "RANK" not in os.environ:
        refuse_bare_srun()
        with translate_out_of_memory():
            yield
        return
    exit_with_parent()
    waits = timedelta(seconds=timeout)
    store, number, size = rendezvous(waits)
    ranks_store = dist.PrefixStore("ranks", store)
    gpu = select_own_gpu(device)
    if not have_all_ranks(ranks_store, size, gpu is not None):
        gpu = None  # NCCL would wait forever; `pick_device` reports the rank without a GPU
    init_process_group(ranks_store, number, size, waits, gpu)
    try:
        with translate_out_of_memory():
            yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors: its own name its source files, those of torch around it
        # say that a wait or an operation timed out
        if not isinstance(error, dist.DistError) and not SILENCE.search(str(error)):
            raise
        exit_naming_silent_ranks(dist.PrefixStore("alive", store), number, size, timeout, error)
    # not in a finally: after an error the group may hang on ranks that have gone
    dist.destroy_process_group()


def select_own_gpu(name: str) -> torch.device | None:
    """Make GPU number LOCAL_RANK the current one; return None without one or if `name` is cpu."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "cpu" or not torch.cuda.is_available() or local_rank >= torch.cuda.device_count():
        return None
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def have_all_ranks(store: dist.Store, size: int, has: bool) -> bool:
    """Return, on all `size` ranks, whether `has` is True on each; in an empty store of the ranks.

    A rank makes five requests, however many ranks there are.
    """
    store.add("have", int(has))
    if store.add("answered", 1) == size:
        store.set("all answered", "")
    store.wait(["all answered"])
    return store.add("have", 0) == size


def init_process_group(
    store: dist.Store, number: int, size: int, waits: timedelta, gpu: torch.device | None
) -> None:
    """Create the process group: gloo, and NCCL bound to `gpu` if there is one.

    NCCL waits `NCCL_EXTRA` seconds longer than gloo.
    """
    if gpu is None:
        dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=waits)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl",
        store=store,
        rank=number,
        world_size=size,
        timeout=waits,
        device_id=gpu,
    )
    # init_process_group gives its timeout to both backends, whatever their options say
    group = dist.group.WORLD
    assert group is not None
    backend = group._get_backend(gpu)
    backend._set_default_timeout(waits + timedelta(seconds=NCCL_EXTRA))


def rendezvous(waits: timedelta) -> tuple[dist.Store, int, int]:
    """Return an empty store that all processes share, the rank of this one, and their number.

    Raises:
        UserError: the port is taken, not all processes came in time, or torchrun's environment
            variables are not all set.
    """
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=waits))
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        is_port_taken = "EADDRINUSE" in str(error)
        reason = (
            "the port is taken by another program" if is_port_taken else str(error).splitlines()[0]
        )
        raise UserError(
            f"the processes cannot meet at {place}: {reason}; choose another --master-port, or let "
            "torchrun find one: --standalone, on one machine"
        ) from error
    except ValueError as error:
        raise UserError(
            f"RANK is set, so torchrun should have started this process, but {error}; let torchrun "
            "start it, or unset RANK to train with one process"
        ) from error
    try:
        return dist.PrefixStore(agree_on_start(store, number, size, waits), store), number, size
    except dist.DistError as error:
        raise UserError(
            f"the processes cannot meet: {error}; see what those ranks printed, and run the same "
            "command again"
        ) from error


def agree_on_start(store: dist.Store, number: int, size: int, waits: timedelta) -> str:
    """Return a name of this start of the processes: one for all ranks, never used before.

    torchrun keeps its store when it restarts the workers, and a rank that finds the address of
    another rank's predecessor there cannot connect. Neither the number of restarts (a new node does
    not increase it) nor anything else in the environment distinguishes two starts. So each rank
    asks under its own unique name, and rank 0 answers every request, even those of predecessors,
    until all ranks have confirmed the answer. A predecessor that is still alive could be taken for
    its successor, so workers must have ended before others are started, as torchrun ensures.

    Raises:
        DistError: some rank did not come within `waits`.
    """
    if number > 0:
        question = uuid4().hex
        store.set(f"question/{number}", question)
        try:
            start = store.get(f"answer/{question}").decode()
        except dist.DistStoreError as error:
            raise dist.DistError(
                f"rank 0 of {size} did not come within {waits.total_seconds():g} s"
            ) from error
        store.set(f"{start}/{number}", "confirmed")
        return start
    start, absent = uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + waits.total_seconds()
    while absent:
        for peer in absent:
            if store.check([f"question/{peer}"]):
                store.set(f"answer/{store.get(f'question/{peer}').decode()}", start)
        time.sleep(POLL)
        absent = {peer for peer in absent if not store.check([f"{start}/{peer}"])}
        if absent and time.monotonic() > deadline:
            raise dist.DistError(
                f"rank {', '.join(map(str, sorted(absent)))} of {size} did not come within "
                f"{waits.total_seconds():g} s"
            )
    return start


def refuse_bare_srun() -> None:
    """Raise UserError if srun started several processes, which do not know of each other."""
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if count > 1:
        raise UserError(
            f"srun started {count} processes that do not know of each other: let it start torchrun "
            "once per node (--ntasks-per-node 1), as examples/slurm.sh does"
        )


@contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error, of the GPU or of the host, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and HOST_FULL not in str(error):
            raise
        request = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "this machine"
        raise UserError(
            f"{where} is out of memory{f' ({request[1]} more were requested)' if request else ''}: "
            "--grad-accum-steps 2, 4 ... processes the same batch in micro-batches; a smaller "
            "--batch-size or --crop-size also needs less"
        ) from error


def exit_naming_silent_ranks(
    store: dist.Store, number: int, size: int, timeout: int, error: Exception
) -> None:
    """End this rank; the lowest live rank names the others that do not answer.

    The other ranks ask only until they find that one: one store answers 17,000 requests per second,
    so a thousand ranks that all asked for each other would wait a minute.
    """
    try:
        store.set(str(number), "alive")
        time.sleep(GRACE)
        lowest = next(peer for peer in range(size) if peer == number or store.check([str(peer)]))
        is_lowest = number == lowest
        peers = range(size) if is_lowest else ()
        silent = [peer for peer in peers if not store.check([str(peer)])]
    except dist.DistError as lost:
        raise UserError(
            "the machine of rank 0 or its torchrun, which all processes ask for each other, does "
            "not answer; run the same command again, which resumes from the last checkpoint if "
            f"there is one\n({str(error).splitlines()[0]})"
        ) from lost
    if is_lowest:
        ranks = ", ".join(map(str, silent))
        culprit = f"rank {ranks} of" if silent else "the network between"
        raise UserError(
            f"{culprit} {size} processes died or was silent for {timeout} s (--rank-timeout); "
            "run the same command again, which resumes from the last checkpoint if there is one\n"
            f"({str(error).splitlines()[0]})"
        ) from error
    raise SystemExit(2)


def exit_with_parent() -> None:
    """Arrange to get SIGTERM when torchrun is killed; its workers would otherwise continue."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # torchrun ended before the request
        raise SystemExit(2)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def pick_device(name: str) -> torch.device:
    """Return this rank's device for `auto`, `cpu` or `cuda`: on CUDA, GPU number LOCAL_RANK."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if select_own_gpu(name) is None and name != "cpu" and torch.cuda.is_available():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has "
            f"{torch.cuda.device_count()}; start no more processes than GPUs"
        )
    # only now: `parse_device` asks for the current GPU, which creates a context there
    return parse_device(name)
