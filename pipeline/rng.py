"""Random numbers of a batch: each sample of an epoch has its own streams.

A stream is NumPy's Philox4x64-10 (Salmon et al. 2011) with key (seed, sample) and counter
(position, copy, purpose, epoch). So its numbers depend on nothing else: not on the batch that the
sample is in, the rank, the world size, the number of threads or the device. Only `random_raw` is
used, whose values NumPy promises never to change (NEP 19); this module converts them to floats.

Each purpose has its own stream, so crop windows and color jitter stay the same when the mask or the
fill is changed.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from pipeline.devices import to_device

Purpose = Literal["crop", "photometric", "regions", "query", "key", "hard_negative", "fill"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

WORDS_AHEAD = 64
"""64-bit words that a stream draws ahead: one NumPy call serves all small draws of a view."""

VECTOR_WIDTH = 16
"""Maximum number of float32 values in a vector register (AVX-512)."""


class Rng:
    """Random numbers of N samples for one purpose; each sample has its own stream.

    The n-th number of a sample depends only on (seed, epoch, sample, purpose, copy) and n, so the
    same calls in the same order give the same numbers, however the samples are batched.

    Args:
        seed, epoch: integers in 0 .. 2^64 - 1.
        samples: (N,) int64, numbers of the samples in the dataset.
        purpose: the use of the numbers.
        copy: distinguishes several streams for one purpose, for example one per hard negative.
        device: device of the returned tensors.
        words: (N, 4 k) uint64, the first words of the streams, if they are drawn already.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        samples: np.ndarray,
        purpose: Purpose,
        copy: int = 0,
        device: torch.device | str = "cpu",
        words: np.ndarray | None = None,
    ) -> None:
        self.samples, self.device = samples, torch.device(device)
        self._seed = seed
        self._counter = [0, copy, PURPOSES.index(purpose), epoch]
        self._words = np.empty((len(samples), 0), np.uint64) if words is None else words
        self._block = self._words.shape[1] // 4  # number of the next block of four words

    def draw_words(self, count: int) -> np.ndarray:
        """Return the next `count` words of each stream, (N, count) uint64."""
        missing = count - self._words.shape[1]
        if missing > 0:
            more = self.draw_blocks(max(missing, WORDS_AHEAD))
            self._words = np.concatenate([self._words, more], axis=1) if self._words.size else more
        drawn_words, self._words = self._words[:, :count], self._words[:, count:]
        return np.ascontiguousarray(drawn_words)

    def draw_blocks(self, count: int) -> np.ndarray:
        """Draw at least `count` more words of each stream, in blocks of four, after those already
        buffered.

        Returns:
            (N, 4 k) uint64, where k is the number of blocks.
        """
        blocks = -(-count // 4)
        words = np.empty((len(self.samples), 4 * blocks), np.uint64)
        # one generator is moved from stream to stream: creating one takes ten times as long, and
        # NumPy reads the numbers of a state faster from lists than from arrays
        bits: Any = Philox(key=0)
        key = [self._seed, 0]
        counter = [self._block, *self._counter[1:]]
        state = bits.state | {"state": {"counter": counter, "key": key}, "buffer": [0] * 4}
        for row, sample in enumerate(self.samples.tolist()):
            key[1] = sample
            bits.state = state
            words[row] = bits.random_raw(4 * blocks)
        self._block += blocks
        return words

    def uniform_on_host(self, *shape: int) -> Tensor:
        """Draw uniform float64 numbers in [0, 1), on the CPU whatever the device.

        Args:
            shape: its first number is k N for an integer k: each sample gets k consecutive rows.
        """
        count = int(np.prod(shape, dtype=np.int64)) // max(1, len(self.samples))
        uniform = (self.draw_words(count) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy(uniform.reshape(shape))

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform float64 numbers in [0, 1) on the device; `shape`: see `uniform_on_host`."""
        return to_device(self.uniform_on_host(*shape), self.device)

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal float32 numbers on the device, with absolute values up to 5.4.

        The bits are drawn on the host and are equal everywhere; the inverse error function is the
        device's own, so the values of two devices agree up to rounding.

        Args:
            shape: see `uniform_on_host`.
        """
        count = int(np.prod(shape, dtype=np.int64)) // max(1, len(self.samples))
        words = self.draw_words(count_normal_words(count))
        bits = to_device(torch.from_numpy(words.view(np.int32)), self.device)
        # 24 random bits as (k + 1/2) / 2^23 in (-1, 1): exact in float32, never -1 or 1
        centered = (bits >> 8).float().add_(0.5).mul_(2.0**-23)
        return centered.erfinv_().mul_(2**0.5)[:, :count].reshape(shape)


def count_normal_words(count: int) -> int:
    """Return the number of words of a stream from which it makes `count` normal numbers.

    A word gives two. Each sample draws a multiple of the vector width: on a CPU, numbers outside
    full vectors are rounded differently, so a number would depend on its batch.
    """
    return -(-count // VECTOR_WIDTH) * VECTOR_WIDTH // 2


class BatchRng:
    """The random streams of one batch.

    Args:
        seed, epoch, samples, device: see `Rng`.
        ahead: number of words of each stream to draw now, by purpose and copy. Further words, and
            those of streams not listed, are drawn on demand.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        samples: np.ndarray,
        device: torch.device | str = "cpu",
        ahead: Mapping[tuple[Purpose, int], int] | None = None,
    ) -> None:
        self.seed, self.epoch, self.samples = seed, epoch, samples
        self.device = torch.device(device)
        self._words: dict[tuple[Purpose, int], np.ndarray] = {}
        for (purpose, copy), count in (ahead or {}).items():
            self._words[purpose, copy] = self.stream(purpose, copy).draw_blocks(count)

    def stream(self, purpose: Purpose, copy: int = 0, rows: slice = slice(None)) -> Rng:
        """Return a stream at its first number, for all samples or for some rows of them."""
        words = self._words.get((purpose, copy))
        return Rng(
            *(self.seed, self.epoch, self.samples[rows], purpose, copy, self.device),
            words=None if words is None else words[rows],
        )
