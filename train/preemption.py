"""Preemption: SIGTERM and SIGUSR1, which a cluster sends before it takes a machine back.

The run saves a checkpoint and ends. SIGINT (Ctrl-C) does the same once; a second one ends at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from schemas.cli import TerminatedError
from train.distributed import is_main, world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

STATUS = 75
"""Exit status of a run that was preempted and has saved (EX_TEMPFAIL of sysexits.h)."""


def can_handle_signals() -> bool:
    """Return whether this is the main thread: Python lets no other one handle signals."""
    return threading.current_thread() is threading.main_thread()


class PreemptionListener:
    """Notices the signals that ask this process to stop, and tells all ranks."""

    def __init__(self) -> None:
        self.is_requested = False
        self.pending: tuple[torch.Tensor, dist.Work] | None = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Note the signals within this block instead of dying from them, if that is possible."""
        if not can_handle_signals():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            self.is_requested = True
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def poll_all_ranks(self) -> bool:
        """Return whether any rank was asked to stop, the same answer on all ranks.

        Every rank must call it once per step. With several ranks, the answer to a step's question
        is returned at the next step, so that no rank waits for it.
        """
        if world_size() == 1:
            return self.is_requested
        answer = False
        if self.pending is not None:
            flag, work = self.pending
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.is_requested))
        self.pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        return answer


def exit_preempted(step: int) -> None:
    """End every rank after a preemption; rank 0 reports it."""
    if is_main():
        raise TerminatedError(
            f"stopped and saved after step {step}; run the same command again to resume",
            STATUS,
        )
    raise SystemExit(STATUS)
