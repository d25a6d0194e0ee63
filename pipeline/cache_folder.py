"""A folder of shards of bounded size, shared by the processes of a host.

    FOLDER/lock                  held while files are counted, added, renamed or removed
    FOLDER/SHA256.tar            a shard, named by its content; .idx and .parquet lie beside it
    FOLDER/SHA256.BYTES.part     a shard that is being fetched, with the bytes reserved for it

All locks are the kernel's (flock), so those of a process that is killed vanish with it, and what it
left half done is removed by whoever counts next. A fetcher holds its `.part` exclusively. Whoever
reads a tar holds it shared, by the very descriptor that it reads from: so eviction knows what is in
use. Evicting a file in use harms no reader, because an open file can be read after it is unlinked.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from hashlib import file_digest
from pathlib import Path
from typing import NamedTuple

from schemas import ShardRow


class ShardFiles(NamedTuple):
    """The three files of a shard.

    Attributes:
        tar: an open file descriptor of the whole tar, read-only; whoever gets it closes it.
        idx, parquet: contents of the DALI index and of the shard's table.
    """

    tar: int
    idx: bytes
    parquet: bytes


class Refusal(Enum):
    """Why a shard need not or cannot be fetched now."""

    PRESENT = "the shard is in the folder"
    FETCHED_ELSEWHERE = "another thread or process is fetching it"
    FULL = "there is no room that may be taken for it"


@dataclass(frozen=True)
class Part:
    """A file that a shard is fetched into.

    Attributes:
        lock: descriptor that holds the file exclusively.
        reserved: bytes that are counted for the shard's three files.
    """

    path: Path
    lock: int
    reserved: int


class StoredShard(NamedTuple):
    """A shard in the folder: its name, the bytes of its three files and its last use in ns."""

    sha256: str
    size: int
    used: int


class CacheFolder:
    """Adds, opens and evicts shards such that the files never take more than `limit` bytes.

    Attributes:
        evicted: number of shards that this object removed to make room.
        evicted_in_use: those of them that some process still had open.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.evicted = self.evicted_in_use = 0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder alone, waiting for whoever holds it."""
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def path(self, sha256: str, suffix: str) -> Path:
        return self.folder / f"{sha256}.{suffix}"

    def is_present(self, row: ShardRow) -> bool:
        return self.path(row.sha256, "tar").exists()

    def held(self) -> int:
        """Return the bytes of everything in the folder, reservations included."""
        with self.lock():
            shards, reserved = self._scan()
        return sum(shard.size for shard in shards) + reserved

    def open(self, row: ShardRow) -> ShardFiles | None:
        """Open a shard and note its use; None where it is not in the folder (any more).

        A file of another size, or one from before this machine started that is not what its name
        says (its content may not have reached the disk), is removed.
        """
        try:
            tar = os.open(self.path(row.sha256, "tar"), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(tar, fcntl.LOCK_SH)
            idx, parquet = (self.path(row.sha256, suffix) for suffix in ("idx", "parquet"))
            if idx.exists() and parquet.exists() and is_intact(tar, row):
                files = ShardFiles(tar, idx.read_bytes(), parquet.read_bytes())
                os.utime(tar)
                return files
            with self.lock():
                self._remove(row.sha256)
        except FileNotFoundError:
            pass  # evicted just now
        except BaseException:
            os.close(tar)
            raise
        os.close(tar)
        return None

    def note_use(self, row: ShardRow) -> None:
        """Make a shard that will be needed soon the last one to be evicted by others."""
        with suppress(FileNotFoundError):  # evicted since: whoever opens it fetches it again
            os.utime(self.path(row.sha256, "tar"))

    def reserve(
        self, row: ShardRow, size: int, needed: Mapping[str, int], is_urgent: bool
    ) -> Part | Refusal:
        """Make room for a shard and begin its file.

        Shards that are not in `needed` go first, oldest use first, then those needed latest. What
        is needed sooner or is in use stays, unless the shard is urgent.

        Args:
            size: bytes of its three files, at most.
            needed: sha256 of the shards that this process will need -> position in that order.
            is_urgent: somebody waits for this very shard.
        """
        with self.lock():
            if self.is_present(row):
                return Refusal.PRESENT
            shards, reserved = self._scan()
            if self._parts(row.sha256):
                return Refusal.FETCHED_ELSEWHERE
            total = sum(shard.size for shard in shards) + reserved
            if not self._make_room(shards, total + size - self.limit, row, needed, is_urgent):
                return Refusal.FULL
            path = self.path(row.sha256, f"{size}.part")
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return Part(path, lock, size)

    def commit(self, part: Part, row: ShardRow, idx: bytes, parquet: bytes) -> None:
        """Turn a part whose tar is whole into a shard of the folder; the tar's name comes last."""
        try:
            with self.lock():
                self.path(row.sha256, "idx").write_bytes(idx)
                self.path(row.sha256, "parquet").write_bytes(parquet)
                part.path.rename(self.path(row.sha256, "tar"))
        finally:
            self.abandon(part)

    def abandon(self, part: Part) -> None:
        """Remove a part, if it was not committed, and let those who wait for it go on."""
        with self.lock():
            part.path.unlink(missing_ok=True)
            os.close(part.lock)

    def wait_for_fetch(self, row: ShardRow) -> None:
        """Wait until nobody fetches a shard any more."""
        for path in self._parts(row.sha256):
            with suppress(FileNotFoundError), path.open("rb") as file:  # it may end just now
                fcntl.flock(file, fcntl.LOCK_SH)

    def _parts(self, sha256: str) -> list[Path]:
        return list(self.folder.glob(f"{sha256}.*.part"))

    def _scan(self) -> tuple[list[StoredShard], int]:
        """Return the shards and the reserved bytes; remove what killed processes left.

        Called with the lock held.
        """
        with os.scandir(self.folder) as entries:
            files = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        shards, reserved = [], 0
        for name, status in files.items():
            sha256, _, suffix = name.partition(".")
            if suffix == "tar":
                beside = (files.get(f"{sha256}.{other}") for other in ("idx", "parquet"))
                size = status.st_size + sum(file.st_size for file in beside if file is not None)
                shards.append(StoredShard(sha256, size, status.st_mtime_ns))
            elif suffix in ("idx", "parquet") and f"{sha256}.tar" not in files:
                (self.folder / name).unlink()
            elif suffix.endswith(".part"):
                with exclusively(self.folder / name) as is_abandoned:
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
        """Evict until `excess` bytes are gone; False where too little may go."""
        position = -1 if is_urgent else needed.get(row.sha256, len(needed))
        order = sorted(
            (shard for shard in shards if needed.get(shard.sha256, position + 1) > position),
            key=lambda shard: (shard.sha256 in needed, -needed.get(shard.sha256, 0), shard.used),
        )
        in_use = []
        for shard in order:
            if excess <= 0:
                return True
            with exclusively(self.path(shard.sha256, "tar")) as is_free:
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
        """Remove a shard, its tar first: without it the other two files count as left over."""
        for suffix in ("tar", "idx", "parquet"):
            self.path(sha256, suffix).unlink(missing_ok=True)


@contextmanager
def exclusively(path: Path) -> Iterator[bool]:
    """Try to hold a file alone, without waiting; yields whether that is so."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_intact(tar: int, row: ShardRow) -> bool:
    """Compare an open tar with its row: its size, and its bytes unless written since the boot."""
    status = os.fstat(tar)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    if status.st_size != row.bytes or status.st_ctime > booted:
        return status.st_size == row.bytes
    with os.fdopen(os.dup(tar), "rb") as file:
        return file_digest(file, "sha256").hexdigest() == row.sha256
