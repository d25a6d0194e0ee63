"""Read the encoded samples of a batch from local shards, or through the cache of remote ones.

A shard's index has the byte offsets of its samples; its parquet file has labels, heights and
widths. Both are read when a shard is opened, and a shard stays open for the duration of its
shuffle window. Each sample is one `preadv` into its batch's buffer, because its image and its map
are adjacent. Reads release the GIL and use no memory map, so truncating a file while it is read
causes an exception, not a bus error.
"""

import errno
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import file_digest
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.buffers import BufferPool
from pipeline.cache import Cache, ShardCache
from pipeline.cache_folder import TOO_MANY_FILES, ShardFiles
from pipeline.order import Order
from pipeline.shard_contents import (
    COLUMNS,
    DamagedShardError,
    build_damage_error,
    parse_shard_contents,
)
from schemas import ShardDataset, ShardRow, UserError
from schemas.shard import BLOCK
from schemas.tables import shard_name

READERS = 2
"""Parts of a batch that are read concurrently (our choice; in bench/loader.py, 1 is 5-15 % slower,
and 4 is slower too)."""

WINDOWS_AHEAD = 3
"""Shuffle windows that are announced to a cache: the one in use and those that follow."""


class ShardSource(Protocol):
    """A source of shards: a local folder, or the cache of a remote one.

    Attributes:
        description: one line for the user about where shards are kept; empty for a local dataset.
        is_private: True if nobody else writes the tars, so that no change of them has to be looked
            for.
    """

    is_private: bool

    @property
    def description(self) -> str: ...

    def prefetch(self, shards: Sequence[int]) -> None:
        """Prepare for opening these shards, in this order."""

    def open(self, shard: int) -> ShardFiles:
        """Open the files of a shard. Raises a UserError that names the shard."""


class LocalShards:
    """The shards of a dataset in a local folder."""

    description = ""
    is_private = False

    def __init__(self, dataset: ShardDataset) -> None:
        self.folder = Path(dataset.store.root)
        self._rows = {row.shard: row for row in dataset.shards}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing, because `open` asks the kernel to read ahead."""

    def open(self, shard: int) -> ShardFiles:
        index, table, tar = (self.folder / shard_name(shard, e) for e in ("idx", "parquet", "tar"))
        try:
            idx, parquet = index.read_bytes(), table.read_bytes()
            descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise UserError(f"{error.filename}: shard {shard}: {TOO_MANY_FILES}") from error
            reason = "is missing" if isinstance(error, FileNotFoundError) else error.strerror
            raise DamagedShardError(f"{error.filename}: shard {shard}: {reason}") from error
        # samples are read in random order, but a disk is faster from start to end
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        try:
            contents = parse_shard_contents(
                self._rows[shard], idx, parquet, str(tar.with_suffix(""))
            )
        except DamagedShardError:
            os.close(descriptor)
            raise
        return ShardFiles(descriptor, contents)


def open_source(dataset: ShardDataset, cache: Cache | None, open_shards: int = 1) -> ShardSource:
    """Return the source of a dataset's shards.

    Args:
        cache: cache for the shards of a remote dataset; a local dataset is read in place unless the
            cache names a folder.
        open_shards: number of shards that are open at the same time.

    Raises:
        UserError: the cache cannot be used, or is too small for that many shards.
    """
    if dataset.store.is_local and (cache is None or cache.folder is None):
        return LocalShards(dataset)
    source = ShardCache(dataset, cache or Cache())
    source.require(open_shards)
    return source


@dataclass(frozen=True)
class EncodedBatch:
    """N encoded samples.

    Attributes:
        samples: (N,) int64, sample numbers in the dataset.
        images, maps: N files each, (bytes,) uint8: the image, and the PNG of its saliency.
        labels: (N,) int64; -1 for samples without a label.
        height, width: (N,) int64, pixels of the oriented images.
        keys: N sample keys.
        shards: N locations of the samples' shards, without an extension.
    """

    samples: np.ndarray
    images: list[np.ndarray]
    maps: list[np.ndarray]
    labels: np.ndarray
    height: np.ndarray
    width: np.ndarray
    keys: list[str]
    shards: list[str]


class OpenShard:
    """An open shard.

    Attributes:
        tar: file descriptor of its tar.
        location: location of its files, without an extension.
        samples: its samples.
        names: first bytes of the tar header of each sample's image.
        modified: time in ns of its tar's last change when it was opened; None if changes do not
            matter.

    Args:
        is_private: True if `check_unchanged` need not look for changes. The time of a tar in a
            cache is that of its last use.

    Raises:
        DamagedShardError: the tar does not have the size that `row` says.
    """

    def __init__(self, row: ShardRow, files: ShardFiles, location: str, is_private: bool) -> None:
        self.row, self.tar, self.location = row, files.tar, location
        status = os.fstat(self.tar)
        if status.st_size != row.bytes:
            raise self.build_error(f"it has {status.st_size} bytes, the table says {row.bytes}")
        self.modified = None if is_private else status.st_mtime_ns
        self.samples = files.contents
        self.names = [f"{key}.".encode() for key in self.samples.keys]

    def read(self, index: int, offset: int, content: np.ndarray) -> None:
        """Read `content`, (bytes,) uint8, which begins with the tar header of sample `index`.

        Raises:
            DamagedShardError: the file was truncated or changed since it was opened.
        """
        try:
            count = os.preadv(self.tar, (content.data,), offset)
        except OSError as error:
            raise self.build_error(
                f"sample {self.samples.keys[index]}: {error.strerror}"
            ) from error
        name = self.names[index]
        if count < len(content):
            raise self.build_error(
                f"sample {self.samples.keys[index]} is cut short at byte {offset + count}"
            )
        if content[: len(name)].tobytes() != name:
            raise self.build_error(
                f"sample {self.samples.keys[index]} is not at byte {offset} any more"
            )

    def check_unchanged(self) -> None:
        """Compare the tar with its sha256 when it has another time than when it was opened.

        Raises:
            DamagedShardError: it has changed, perhaps within images that still decode.
        """
        if self.modified is None or os.fstat(self.tar).st_mtime_ns == self.modified:
            return
        self.modified = None  # after a change of the time alone, and where times are not stable
        with os.fdopen(os.dup(self.tar), "rb") as file:
            file.seek(0)
            if file_digest(file, "sha256").hexdigest() == self.row.sha256:
                return
        image, _, saliency, saliency_size = self.samples.values[-4:]
        starts, ends = (image - BLOCK).tolist(), (saliency + saliency_size).tolist()
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self.read(index, start, np.empty(end - start, np.uint8))  # names a sample at fault
        raise self.build_error("it has changed since it was opened")

    def build_error(self, reason: str) -> DamagedShardError:
        """Return an error about the shard's tar."""
        return build_damage_error(self.row, self.location, "tar", reason)

    def close(self) -> None:
        os.close(self.tar)


class ShardReader:
    """Reads the batches of one rank.

    Args:
        source: opens the shards.
        order: determines the samples of each batch and the shards that are needed next.
        rank, world_size: global rank of this process and the number of processes.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        source: ShardSource,
        order: Order,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.dataset, self.source, self.order = dataset, source, order
        self.rank, self.world_size = rank, world_size
        self._open: dict[int, OpenShard] = {}
        # shards of the last batch's shuffle windows, and the same plus those of the following ones
        self._current: set[int] = set()
        self._coming: set[int] = set()
        self._epoch = -1
        self._buffers = BufferPool()
        self._pool = ThreadPoolExecutor(READERS - 1, "read")

    def read(self, epoch: int, step: int) -> EncodedBatch:
        """Read a batch.

        Raises:
            DamagedShardError: a shard or a sample does not match the tables; the message names
                both, and the command that lists all such problems.
            UserError: the source cannot provide a shard.
        """
        samples = self.order.batch(epoch, step, self.rank, self.world_size)
        numbers, indices = self.order.locate(samples)
        needed = dict.fromkeys(numbers.tolist())
        if epoch != self._epoch or not self._current.issuperset(needed):
            self._announce(needed, epoch, step)
            # those that a later window needs again are closed too: open ones are not evicted
            for number in self._open.keys() - self._current:
                self._open.pop(number).close()
        try:
            shards = [self._open.get(number) or self.open(number) for number in numbers.tolist()]
            batch = self._read_batch(samples, shards, numbers, indices)
            for shard in set(shards):
                shard.check_unchanged()
        except DamagedShardError as error:
            raise DamagedShardError(
                f"{error}; `saliency-shards verify {self.dataset.url}` lists all that has "
                "changed since it was written"
            ) from error
        return batch

    def _read_batch(
        self, samples: np.ndarray, shards: list[OpenShard], numbers: np.ndarray, indices: np.ndarray
    ) -> EncodedBatch:
        """Read the samples at `indices` in `shards`, whose numbers are `numbers`."""
        table = np.empty((len(COLUMNS), len(samples)), np.int64)
        for number, shard in dict(zip(numbers.tolist(), shards, strict=True)).items():
            rows = numbers == number
            table[:, rows] = shard.samples.values[:, indices[rows]]
        label, height, width, image, image_size, saliency, saliency_size = table
        # the image's tar header is read too: its name shows that the file has not changed
        start = image - BLOCK
        size = saliency + saliency_size - start
        ends = np.cumsum(size)
        buffer = self._buffers.take(int(ends[-1]))
        contents = [buffer[a:b] for a, b in zip((ends - size).tolist(), ends.tolist(), strict=True)]
        places = list(zip(shards, indices.tolist(), start.tolist(), contents, strict=True))

        def read_rows(rows: np.ndarray) -> None:
            for row in rows.tolist():
                shard, index, offset, content = places[row]
                shard.read(index, offset, content)

        # samples are numbered in their order on disk: neighbors are read one after the other
        part, *other_parts = np.array_split(np.argsort(samples), READERS)
        pending = [self._pool.submit(read_rows, other_part) for other_part in other_parts]
        try:
            read_rows(part)
        finally:
            wait(pending)
        for future in pending:
            future.result()  # raises the error of that thread
        return EncodedBatch(
            samples=samples,
            images=[
                content[BLOCK:end]
                for content, end in zip(contents, (BLOCK + image_size).tolist(), strict=True)
            ],
            maps=[
                content[begin:]
                for content, begin in zip(contents, (saliency - start).tolist(), strict=True)
            ],
            labels=label,
            height=height,
            width=width,
            keys=[
                shard.samples.keys[index]
                for shard, index in zip(shards, indices.tolist(), strict=True)
            ],
            shards=[shard.location for shard in shards],
        )

    def _announce(self, needed: Iterable[int], epoch: int, step: int) -> None:
        """Tell the source which shards are needed next, if that has changed."""
        windows = self.order.windows(epoch, step, self.rank, self.world_size)
        ahead = [window.shards.tolist() for window in islice(windows, WINDOWS_AHEAD)]
        coming = list(dict.fromkeys(chain(needed, *ahead)))
        if set(coming) != self._coming:
            self.source.prefetch([self.dataset.shards[number].shard for number in coming])
        self._epoch, self._coming = epoch, set(coming)
        begun = [shards for shards in ahead if not set(needed).isdisjoint(shards)]
        self._current = set(chain(needed, *begun))

    def open(self, number: int) -> OpenShard:
        """Return a shard, opening it if necessary."""
        if number not in self._open:
            row = self.dataset.shards[number]
            location = self.dataset.store.location(shard_name(row.shard, "")).removesuffix(".")
            files = self.source.open(row.shard)
            try:
                self._open[number] = OpenShard(row, files, location, self.source.is_private)
            except UserError:
                os.close(files.tar)
                raise
        return self._open[number]

    def close(self) -> None:
        """Close all shards and end the threads; what was announced to the source stays."""
        self._pool.shutdown()
        while self._open:
            self._open.popitem()[1].close()
