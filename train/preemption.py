"""SIGTERM and SIGUSR1, as a cluster sends them before it takes a machine back: save, then end.

SIGINT (Ctrl-C) likewise, once; the second one ends at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from train.distributed import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

STATUS = 75
"""Exit status of a run that was stopped and has saved (EX_TEMPFAIL of sysexits.h): go on later."""


class Interrupt:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.question: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals within the block instead of dying of them."""

        def note(number: int, frame: FrameType | None) -> None:
            self.asked = True
            if number == signal.SIGINT:
                signal.signal(number, before[signal.SIGINT])

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def anywhere(self) -> bool:
        """Whether any rank was asked; called once a step by all of them, who get one answer.

        With several ranks the question of this step is answered at the next one, so that nobody
        waits for it.
        """
        if world_size() == 1:
            return self.asked
        answer = False
        if self.question is not None:
            asked, work = self.question
            work.wait()
            answer = bool(asked)
        asked = torch.tensor(int(self.asked))
        self.question = asked, dist.all_reduce(asked, op=dist.ReduceOp.MAX, async_op=True)
        return answer
