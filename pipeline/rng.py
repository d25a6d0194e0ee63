"""Random numbers of a batch: each sample of an epoch has streams of its own.

A stream is NumPy's Philox4x64-10 (Salmon et al. 2011) with key (seed, sample) and counter
(position, copy, purpose, epoch), so a number depends on nothing else: not on the batch that the
sample is in, the rank, the world size, the number of threads or the device. Only `random_raw` is
used, whose values NumPy promises never to change (NEP 19); floats are made of them here.

One stream a purpose keeps them apart: another mask or another fill leaves crop windows and color
jitter as they were.
"""

from typing import Literal, get_args

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from pipeline.devices import to_device

Purpose = Literal["crop", "photometric", "regions", "query", "key", "hard_negative", "fill"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

WORDS = 64
"""64-bit words that a stream draws ahead: one call of NumPy for all the small draws of a view."""


REGISTER = 16
"""float32 numbers that a CPU works on at a time, at most (AVX-512)."""


class Rng:
    """Random numbers of N samples for one purpose, each sample's from its own stream.

    The n-th number of a sample depends only on (seed, epoch, sample, purpose, copy) and n, so the
    same calls in the same order give the same numbers, however the samples are batched.

    Args:
        seed, epoch: 0 .. 2^64 - 1.
        samples: (N,) int64, the samples' numbers in their dataset.
        purpose: what the numbers are for.
        copy: tells several streams of one purpose apart, say one for each hard negative.
        device: where tensors are returned.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        samples: np.ndarray,
        purpose: Purpose,
        copy: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples, self.device = samples, torch.device(device)
        self._bits = Philox(
            key=np.array([seed, 0], np.uint64),
            counter=np.array([0, copy, PURPOSES.index(purpose), epoch], np.uint64),
        )
        self._block = 0  # of four words, the next one to be drawn
        self._words = np.empty((len(samples), 0), np.uint64)

    def raw(self, count: int) -> np.ndarray:
        """Return the next `count` words of each stream: (N, count) uint64."""
        missing = count - self._words.shape[1]
        if missing > 0:
            self._words = np.concatenate([self._words, self._draw(max(missing, WORDS))], axis=1)
        taken, self._words = self._words[:, :count], self._words[:, count:]
        return np.ascontiguousarray(taken)

    def _draw(self, count: int) -> np.ndarray:
        """Draw at least `count` words of each stream, in whole blocks of four."""
        blocks = -(-count // 4)
        words = np.empty((len(self.samples), 4 * blocks), np.uint64)
        # one generator that is sent from stream to stream: making one takes ten times as long
        state = self._bits.state
        state["state"]["counter"][0] = self._block
        for row, sample in zip(words, self.samples, strict=True):
            state["state"]["key"][1] = sample
            self._bits.state = state
            row[:] = self._bits.random_raw(len(row))
        self._block += blocks
        return words

    def on_host(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float64, on the CPU whatever the device.

        Args:
            shape: its first number is a multiple of N: k N rows are k for each sample, side by
                side.
        """
        count = int(np.prod(shape, dtype=np.int64)) // max(1, len(self.samples))
        uniform = (self.raw(count) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy(uniform.reshape(shape))

    def uniform(self, *shape: int) -> Tensor:
        """Draw what `on_host` draws, on the device."""
        return to_device(self.on_host(*shape), self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw numbers of mean 0 and variance 1, float32, on the device, at most 5.4 from 0.

        The bits are drawn on the host and are equal everywhere; the inverse error function is the
        device's own, so values of two devices agree to rounding.

        Args:
            shape: as of `on_host`.
        """
        count = int(np.prod(shape, dtype=np.int64)) // max(1, len(self.samples))
        # Each sample's numbers fill whole vector registers: those that do not are rounded
        # differently on a CPU, and then a number would depend on the batch that it is in.
        words = self.raw(-(-count // REGISTER) * REGISTER // 2)
        bits = to_device(torch.from_numpy(words.view(np.int32)), self.device)
        # 24 random bits as (k + 1/2) / 2^23 in (-1, 1): exact in float32, never -1 or 1
        centered = (bits >> 8).float().add_(0.5).mul_(2.0**-23)
        return centered.erfinv_().mul_(2**0.5)[:, :count].reshape(shape)


class BatchRng:
    """The streams of one batch, by purpose.

    Args:
        As of `Rng`.
    """

    def __init__(
        self, seed: int, epoch: int, samples: np.ndarray, device: torch.device | str = "cpu"
    ) -> None:
        self.seed, self.epoch, self.samples = seed, epoch, samples
        self.device = torch.device(device)

    def stream(self, purpose: Purpose, copy: int = 0, rows: slice = slice(None)) -> Rng:
        """Start a stream from its first number, for all samples or some rows of them."""
        return Rng(self.seed, self.epoch, self.samples[rows], purpose, copy, self.device)
