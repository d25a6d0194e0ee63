"""A folder of shards with a bounded size, shared by the processes of a host.

    FOLDER/lock                  locked while files are counted, added, renamed or removed
    FOLDER/SHA256.tar            a shard, named by its content, with its .idx and .parquet files
    FOLDER/SHA256.BYTES.part     a shard that is being fetched, with the bytes reserved for it

All locks are kernel locks (flock): those of a killed process vanish with it, and the next process
that counts the files removes those that it left incomplete. A fetcher locks its `.part`
exclusively. A reader holds a shared lock on the descriptor from which it reads the tar, so eviction
can see which shards are in use. Evicting one of them harms no reader, because an unlinked file can
be read until it is closed.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from hashlib import file_digest
from pathlib import Path
from typing import NamedTuple

from pipeline.shard_contents import DamagedShardError, ShardContents, parse_shard_contents
from schemas import ShardRow

FILE_NAME = re.compile(r"[0-9a-f]{64}\.(tar|idx|parquet|[0-9]+\.part)")
"""Names of the files that a cache makes, and removes."""

TOO_MANY_FILES = (
    "too many open files; raise their limit (`ulimit -n`) or lower --shuffle-shards: a process has "
    "up to twice as many shards open"
)


class ShardFiles(NamedTuple):
    """The files of a shard, opened.

    Attributes:
        tar: open read-only file descriptor of the tar; the caller closes it.
        contents: samples of the shard, from its index and its parquet file.
    """

    tar: int
    contents: ShardContents


class Refusal(Enum):
    """Reasons why a shard need not or cannot be fetched now."""

    PRESENT = "the shard is in the folder"
    FETCHED_ELSEWHERE = "another thread or process is fetching it"
    FULL = "there is not enough evictable space"


@dataclass(frozen=True)
class Part:
    """The file into which a shard is fetched.

    Attributes:
        lock: descriptor with an exclusive lock on the file.
        reserved: bytes reserved for the shard's three files.
    """

    path: Path
    lock: int
    reserved: int


class StoredShard(NamedTuple):
    """A shard in the folder.

    Attributes:
        size: bytes of its three files.
        used: time of its last use, in ns since the epoch.
    """

    sha256: str
    size: int
    used: int


class CacheFolder:
    """Adds, opens and evicts shards so that the files never take more than `limit` bytes.

    Attributes:
        evicted: number of shards that this object removed to make room.
        evicted_in_use: number of those that some process still had open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.evicted = self.evicted_in_use = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, waiting until it is free."""
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:  # closing is not enough: a process that was forked meanwhile has the file too
                fcntl.flock(file, fcntl.LOCK_UN)

    def path(self, sha256: str, suffix: str) -> Path:
        return self.folder / f"{sha256}.{suffix}"

    def is_present(self, row: ShardRow) -> bool:
        return self.path(row.sha256, "tar").exists()

    def count_bytes(self) -> int:
        """Return the bytes of all shards in the folder, including reservations."""
        with self.lock():
            shards, reserved = self._scan()
        return sum(shard.size for shard in shards) + reserved

    def open(self, row: ShardRow) -> ShardFiles | None:
        """Open a shard and record its use; return None if it is not (or no longer) in the folder.

        A shard with a damaged file is removed. The tar's sha256 is verified only if the file is
        older than the last boot: a power failure may have lost some of its data.
        """
        try:
            tar = os.open(self.path(row.sha256, "tar"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            with suppress(FileNotFoundError):  # evicted at this moment
                fcntl.flock(tar, fcntl.LOCK_SH)
                side_files = (self.path(row.sha256, suffix) for suffix in ("idx", "parquet"))
                idx, parquet = (p.read_bytes() if p.exists() else b"" for p in side_files)
                location = os.fspath(self.folder / row.sha256)
                try:
                    contents = parse_shard_contents(row, idx, parquet, location)
                except DamagedShardError:
                    contents = None  # it is fetched again
                if contents is not None and is_intact(tar, row):
                    os.utime(tar)
                    return ShardFiles(tar, contents)
                with self.lock():
                    self._remove(row.sha256)
        except BaseException:
            os.close(tar)
            raise
        os.close(tar)
        return None

    def note_use(self, row: ShardRow) -> None:
        """Mark a shard as just used, so that other processes evict it last.

        One that is older than the last boot keeps its times, by which `open` knows to verify it.
        """
        tar = self.path(row.sha256, "tar")
        with suppress(FileNotFoundError):  # evicted since; opening it fetches it again
            if not is_older_than_boot(tar.stat()):
                os.utime(tar)

    def reserve(
        self, row: ShardRow, size: int, needed: Mapping[str, int], is_urgent: bool
    ) -> Part | Refusal:
        """Make room for a shard and create its file.

        Shards that are not in `needed` are evicted first, least recently used first; then those
        that are needed last. Shards that are needed sooner than this one stay, and so do those in
        use, unless this one is urgent.

        Args:
            size: maximum bytes of the shard's three files.
            needed: maps the sha256 of each shard that this process will need to its position in
                the order of need.
            is_urgent: whether a caller is waiting for this shard.
        """
        with self.lock():
            if self.is_present(row):
                return Refusal.PRESENT
            shards, reserved = self._scan()
            if self._find_parts(row.sha256):
                return Refusal.FETCHED_ELSEWHERE
            total = sum(shard.size for shard in shards) + reserved
            if not self._make_room(shards, total + size - self.limit, row, needed, is_urgent):
                return Refusal.FULL
            path = self.path(row.sha256, f"{size}.part")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return Part(path, lock, size)

    def commit(self, part: Part, row: ShardRow, idx: bytes, parquet: bytes) -> None:
        """Turn a completed part into a shard of the folder; the tar gets its name last."""
        try:
            with self.lock():
                self.path(row.sha256, "idx").write_bytes(idx)
                self.path(row.sha256, "parquet").write_bytes(parquet)
                part.path.rename(self.path(row.sha256, "tar"))
        finally:
            self.abandon(part)

    def abandon(self, part: Part) -> None:
        """Remove a part unless it was committed, and wake those who wait for it."""
        with self.lock():
            part.path.unlink(missing_ok=True)
            fcntl.flock(part.lock, fcntl.LOCK_UN)
            os.close(part.lock)

    def wait_for_fetch(self, row: ShardRow) -> None:
        """Wait until no process is fetching a shard."""
        for path in self._find_parts(row.sha256):
            # the fetch may end at this moment
            with suppress(FileNotFoundError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)

    def _find_parts(self, sha256: str) -> list[Path]:
        """Return the files into which a shard is being fetched."""
        return list(self.folder.glob(f"{sha256}.*.part"))

    def _scan(self) -> tuple[list[StoredShard], int]:
        """Return the shards and the reserved bytes; remove the files that killed processes left.

        Files with other names than those of a cache are the user's and do not count. The caller
        holds the lock.
        """
        with os.scandir(self.folder) as entries:
            files = {
                entry.name: entry.stat()
                for entry in entries
                if FILE_NAME.fullmatch(entry.name) and entry.is_file()
            }
        shards, reserved = [], 0
        for name, status in files.items():
            sha256, _, suffix = name.partition(".")
            if suffix == "tar":
                side_files = (
                    files.get(f"{sha256}.{side_suffix}") for side_suffix in ("idx", "parquet")
                )
                size = status.st_size + sum(file.st_size for file in side_files if file is not None)
                shards.append(StoredShard(sha256, size, status.st_mtime_ns))
            elif suffix in ("idx", "parquet") and f"{sha256}.tar" not in files:
                (self.folder / name).unlink()
            elif suffix.endswith(".part"):
                with try_lock(self.folder / name) as is_abandoned:
                    if is_abandoned:
                        (self.folder / name).unlink()
                    else:
                        reserved += int(suffix.removesuffix(".part"))
        return shards, reserved

    def _make_room(
        self,
        shards: list[StoredShard],
        excess: int,
        row: ShardRow,
        needed: Mapping[str, int],
        is_urgent: bool,
    ) -> bool:
        """Evict shards until `excess` bytes are freed; return False if too few may be evicted."""
        position = -1 if is_urgent else needed.get(row.sha256, len(needed))
        candidates = sorted(
            (shard for shard in shards if needed.get(shard.sha256, position + 1) > position),
            key=lambda shard: (shard.sha256 in needed, -needed.get(shard.sha256, 0), shard.used),
        )
        in_use = []
        for shard in candidates:
            if excess <= 0:
                return True
            with try_lock(self.path(shard.sha256, "tar")) as is_free:
                if not is_free:
                    in_use.append(shard)
                    continue
                self._remove(shard.sha256)
            excess -= shard.size
            self.evicted += 1
        for shard in in_use if is_urgent else []:
            if excess <= 0:
                break
            self._remove(shard.sha256)
            excess -= shard.size
            self.evicted += 1
            self.evicted_in_use += 1
        return excess <= 0

    def _remove(self, sha256: str) -> None:
        """Remove a shard, its tar first: without it the other two files count as leftovers."""
        for suffix in ("tar", "idx", "parquet"):
            self.path(sha256, suffix).unlink(missing_ok=True)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Try to lock a file exclusively, without waiting; yield whether that succeeded."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # as in `CacheFolder.lock`


def is_intact(tar: int, row: ShardRow) -> bool:
    """Return whether an open tar has its row's size, and its sha256 if older than the last boot."""
    status = os.fstat(tar)
    if status.st_size != row.bytes or not is_older_than_boot(status):
        return status.st_size == row.bytes
    with os.fdopen(os.dup(tar), "rb") as file:
        return file_digest(file, "sha256").hexdigest() == row.sha256


def is_older_than_boot(status: os.stat_result) -> bool:
    """Return whether a file last changed (its times too) before the machine was booted."""
    return status.st_ctime <= time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
