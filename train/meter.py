"""Numbers of finished steps, kept on the device until they are asked for."""

import time
from typing import Any

import torch
from torch import Tensor

from train.distributed import all_mean


class Meter:
    """Collects steps without waiting for the device, and brings them to the host in one piece."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows: list[dict[str, Any]] = []
        self.scalars: list[Tensor] = []  # of a step each, (names,) on the device
        self.waits: list[float] = []
        self.names: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Leave out the time until now."""
        self.since = time.perf_counter()

    def add(self, scalars: dict[str, Tensor], waited: float, **known: float) -> None:
        """Note one step: what the method reports, its wait in seconds, and what the host knows."""
        self.names = list(scalars)
        self.scalars.append(torch.stack([value.detach() for value in scalars.values()]))
        self.waits.append(waited)
        self.rows.append(known)

    def take(self) -> tuple[list[dict[str, Any]], float]:
        """The steps noted since the last call, means over the ranks, and the seconds they took."""
        values = all_mean(torch.stack(self.scalars)).tolist()
        waits = all_mean(torch.tensor(self.waits, dtype=torch.float64)).tolist()
        seconds = time.perf_counter() - self.since
        rate = len(self.rows) * self.batch_size / seconds
        rows = [
            {
                **known,
                **dict(zip(self.names, value, strict=True)),
                "images_per_second": round(rate, 2),
                "data_wait": round(wait, 6),
            }
            for known, value, wait in zip(self.rows, values, waits, strict=True)
        ]
        self.rows, self.scalars, self.waits = [], [], []
        self.restart()
        return rows, seconds
