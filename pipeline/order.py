"""Sample order: the samples of a global batch as a function of (shard sizes, seed, epoch, step).

    shards of the dataset
      -> dealt to `streams` streams, once for the entire training
      -> permuted within their stream, differently in each epoch
      -> shuffle windows of `shuffle_shards` shards; all samples of one are permuted

A global batch of B samples takes the next B / streams samples of each stream, and rank r of n takes
the r-th of n equal slices of it, so the global batches are the same for any n that divides B. With
as many streams as nodes, each shard is read by one node only.

There is no state and no I/O, and memory is O(shards) plus the windows in use. Permutations are
stable sorts of Philox words (see `rng`), so they are the same on every platform and with every
version of NumPy.
"""

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.random import Philox

from schemas import UserError

SHUFFLE_SHARDS = 16
"""Shards per shuffle window (our choice): 16,000 samples if shards have 1,000."""

ORDER_KEY = 2**64 - 1
"""Second word of the Philox key of all permutations; no sample number equals it."""


def permute(count: int, seed: int, *position_words: int) -> np.ndarray:
    """Return a permutation of 0 .. count - 1, a function of the seed and up to three integers.

    Returns:
        (count,) int64.
    """
    counter = np.array([0, *position_words, *[0] * (3 - len(position_words))], np.uint64)
    bits = Philox(key=np.array([seed, ORDER_KEY], np.uint64), counter=counter)
    return np.argsort(bits.random_raw(count), kind="stable")


class Window(NamedTuple):
    """A shuffle window: shards whose samples are shuffled together.

    Attributes:
        epoch: the epoch that the window belongs to.
        start: position of the window's first sample in its stream.
        shards: shard numbers.
    """

    epoch: int
    start: int
    shards: np.ndarray


class Order(Protocol):
    """An order of samples, which are numbered throughout the dataset."""

    def batch(self, epoch: int, step: int, rank: int, world_size: int) -> np.ndarray:
        """Return the sample numbers of a rank's batch, (N,) int64."""

    def windows(self, epoch: int, step: int, rank: int, world_size: int) -> Iterator[Window]:
        """Yield the windows that a rank reads from a step on, in the order of need."""

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each sample and its index in that shard, both (N,) int64."""


class NumberedSamples:
    """Numbers samples in the order of their shards: `starts[s] + i` is the i-th of shard s.

    Attributes:
        sizes: (shards,) int64, number of samples in each shard.
        starts: (shards + 1,) int64, number of each shard's first sample, and the total.
        samples: total number of samples.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.samples = int(self.starts[-1])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each sample and its index in that shard, both (N,) int64."""
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        return shards, samples - self.starts[shards]


class DiskOrder(NumberedSamples):
    """All samples once, in their order on disk; ranks get contiguous, almost equal parts.

    Args:
        sizes: number of samples in each shard.
        batch_size: samples per batch of one rank; its last batch may be smaller.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, batch_size: int) -> None:
        super().__init__(sizes)
        self.batch_size = batch_size

    def find_part(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return the first sample of a rank's part, and the one after its last."""
        return self.samples * rank // world_size, self.samples * (rank + 1) // world_size

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return at most batch_size int64 sample numbers; they are the same in every epoch."""
        first, end = self.find_part(rank, world_size)
        first += step * self.batch_size
        return np.arange(first, min(end, first + self.batch_size))

    def windows(
        self, epoch: int, step: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Window]:
        """Yield a rank's shards from a step on, as windows of one shard."""
        first, end = self.find_part(rank, world_size)
        position = first + step * self.batch_size
        if position < end:
            shards, _ = self.locate(np.array([position, end - 1]))
            for shard in range(shards[0], shards[1] + 1):
                yield Window(epoch, int(self.starts[shard]) - first, np.array([shard]))


class SampleOrder(NumberedSamples):
    """The shuffled order of samples in every epoch.

    Args:
        sizes: number of samples in each shard; shards may be empty.
        batch_size: samples per global batch, over all ranks.
        seed: random seed, 0 .. 2^64 - 1.
        shuffle_shards: number of shards per shuffle window.
        streams: number of sequences that shards are dealt to; it must divide the batch size.

    Attributes:
        steps: global batches per epoch, the same in every epoch.
        dropped: number of samples that an epoch drops, different ones in each epoch. With one
            stream, these are the samples that do not fill a batch; with several streams, also
            those that longer streams have in excess of the shortest one.

    Raises:
        UserError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        sizes: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int = 0,
        shuffle_shards: int = SHUFFLE_SHARDS,
        streams: int = 1,
    ) -> None:
        if min(batch_size, shuffle_shards, streams) < 1 or not 0 <= seed < 2**64:
            raise UserError(
                f"batch size {batch_size}, shuffle_shards {shuffle_shards}, streams {streams} and "
                f"seed {seed}: the seed is in 0 .. 2^64 - 1, the others are at least 1"
            )
        if batch_size % streams:
            raise UserError(
                f"a global batch of {batch_size} samples cannot be shared equally by {streams} "
                "streams; choose a number of streams that divides the batch"
            )
        super().__init__(sizes)
        self.batch_size, self.seed = batch_size, seed
        self.shuffle_shards, self.streams = shuffle_shards, streams
        self._dealt = deal(self.sizes, streams, seed)
        shortest = min(int(self.sizes[shards].sum()) for shards in self._dealt)
        self.steps = shortest // (batch_size // streams)
        self.dropped = self.samples - self.steps * batch_size
        # with a small dataset, the windows that are announced reach into later epochs
        self._epoch_windows = lru_cache(4 * streams)(self._plan_windows)
        self._window_samples = lru_cache(2 * streams)(self._permute_window)

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
        """Return the samples of a rank's slice of a global batch.

        Args:
            step: step in the epoch, 0 .. steps - 1.

        Returns:
            (batch_size / world_size,) int64 sample numbers.

        Raises:
            UserError: the world size does not divide the batch, or neither the world size nor the
                number of streams divides the other.
        """
        first, last = self.find_slice(rank, world_size)
        share = self.batch_size // self.streams
        parts = []
        for stream in range(first // share, (last - 1) // share + 1):
            begin, end = max(first, stream * share), min(last, (stream + 1) * share)
            offset = (step - stream) * share
            parts.append(self._take(epoch, stream, begin + offset, end + offset))
        return np.concatenate(parts)

    def find_slice(self, rank: int, world_size: int) -> tuple[int, int]:
        """Return the bounds of a rank's slice of a global batch.

        Raises:
            UserError: see `batch`.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"a global batch of {self.batch_size} samples cannot be shared equally by "
                f"{world_size} ranks"
            )
        if self.streams % world_size and world_size % self.streams:
            raise UserError(
                f"{world_size} ranks cannot share {self.streams} streams: one number must divide "
                "the other"
            )
        size = self.batch_size // world_size
        return rank * size, (rank + 1) * size

    def windows(
        self, epoch: int, step: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Window]:
        """Yield the windows that a rank reads from a step on, without end, in the order of need."""
        first, last = self.find_slice(rank, world_size)
        share = self.batch_size // self.streams
        streams = range(first // share, (last - 1) // share + 1)
        position = step * share
        while True:
            windows_by_stream = (self._windows_from(epoch, stream, position) for stream in streams)
            yield from heapq.merge(*windows_by_stream, key=lambda window: window.start)
            epoch, position = epoch + 1, 0

    def _windows_from(self, epoch: int, stream: int, position: int) -> Iterator[Window]:
        """Yield a stream's windows of one epoch, from the one at `position` to the last needed."""
        bounds = self._epoch_windows(epoch, stream)[1]
        end = self.steps * (self.batch_size // self.streams)
        number = int(np.searchsorted(bounds, position, side="right")) - 1
        while number < len(bounds) - 1 and bounds[number] < end:
            yield self._window(epoch, stream, number)
            number += 1

    def _take(self, epoch: int, stream: int, begin: int, end: int) -> np.ndarray:
        """Return the samples at positions begin .. end - 1 of a stream."""
        bounds = self._epoch_windows(epoch, stream)[1]
        parts = []
        while begin < end:
            number = int(np.searchsorted(bounds, begin, side="right")) - 1
            until = min(end, int(bounds[number + 1]))
            samples = self._window_samples(epoch, stream, number)
            parts.append(samples[begin - bounds[number] : until - bounds[number]])
            begin = until
        return np.concatenate(parts)

    def _window(self, epoch: int, stream: int, number: int) -> Window:
        """Return a window of a stream by its number in the epoch."""
        shards, bounds = self._epoch_windows(epoch, stream)
        first = number * self.shuffle_shards
        return Window(epoch, int(bounds[number]), shards[first : first + self.shuffle_shards])

    def _plan_windows(self, epoch: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
        """Permute a stream's shards; return them, and the positions of the window boundaries."""
        dealt = self._dealt[stream]
        shards = dealt[permute(len(dealt), self.seed, epoch + 1, stream)]
        ends = np.concatenate([[0], np.cumsum(self.sizes[shards])])
        bounds = ends[:: self.shuffle_shards]
        return shards, bounds if bounds[-1] == ends[-1] else np.append(bounds, ends[-1])

    def _permute_window(self, epoch: int, stream: int, number: int) -> np.ndarray:
        """Return the permuted samples of a window."""
        shards = self._window(epoch, stream, number).shards
        samples = np.concatenate(
            [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in shards]
        )
        return samples[permute(len(samples), self.seed, epoch + 1, stream, number + 1)]


def deal(sizes: np.ndarray, streams: int, seed: int) -> list[np.ndarray]:
    """Deal shards to streams in a random order, each to the stream that is shortest so far.

    A shard stays in its stream for the entire training, so all epochs have the same number of
    steps, and a node that reads one stream finds its shards in its cache again.

    Returns:
        The shard numbers of each stream, (S_i,) int64, without the empty shards.
    """
    shards = np.flatnonzero(sizes)
    shards = shards[permute(len(shards), seed)]
    dealt: list[list[int]] = [[] for _ in range(streams)]
    lengths = [(0, stream) for stream in range(streams)]
    for shard in shards.tolist():
        length, stream = heapq.heappop(lengths)
        dealt[stream].append(shard)
        heapq.heappush(lengths, (length + int(sizes[shard]), stream))
    return [np.array(part, np.int64) for part in dealt]
