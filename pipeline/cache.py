"""Prefetch the shards of a remote dataset into a bounded folder on a local disk.

The order in which shards are needed is known, so several are fetched at a time before they are
needed. The folder and its eviction are in `pipeline.cache_folder`; requests, checks and retries are
in `pipeline.cache_download`.
"""

import atexit
import errno
import logging
import os
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache_download import ATTEMPTS, BACKOFF, DISK_FULL, Downloader
from pipeline.cache_folder import TOO_MANY_FILES, CacheFolder, Refusal, ShardFiles
from pipeline.mounts import find_network_mount
from schemas import ShardDataset, ShardRow, UserError

log = logging.getLogger(__name__)

DISK_SHARE = 0.5
"""Default limit, as a share of the disk's free space plus what is in the folder already (our
choice)."""

CONCURRENT_FETCHES = 8
"""Shards that a process fetches concurrently (our choice): one S3 request gives about 90 MB/s."""

POLL_SECONDS = 0.1
"""Seconds between two checks for free room, or for a shard that another process fetches."""

SIDE_BYTES = 1024
"""Bytes reserved for index and table: this per sample, and 64 times this per shard (our choice)."""


@dataclass(frozen=True)
class Cache:
    """Folder and maximum size of the cache.

    Attributes:
        folder: folder on a local disk, created if missing. None: see `find_default_folder`.
        limit: maximum bytes of all datasets together. None: half of the free disk space,
            counting the files in the folder as free.
    """

    folder: Path | None = None
    limit: int | None = None


def find_default_folder() -> Path:
    """Return the default folder of the cache.

    It is `saliency-shards` in $XDG_CACHE_HOME or ~/.cache. If that is not local or not writable,
    for example because the home directory is on NFS, it is `saliency-shards-UID` in the folder for
    temporary files ($TMPDIR or /tmp).
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    existing = next((path for path in (caches, *caches.parents) if path.exists()), caches)
    if (
        caches.is_absolute()
        and find_network_mount(str(caches)) is None
        and os.access(existing, os.W_OK)
    ):
        return caches / "saliency-shards"
    return Path(tempfile.gettempdir()) / f"saliency-shards-{os.getuid()}"


def open_folder(cache: Cache) -> CacheFolder:
    """Create and check the folder of a cache.

    Raises:
        UserError: the folder is not writable, is on a network file system, or does not support
            locks.
    """
    folder = cache.folder or find_default_folder()
    if kind := find_network_mount(str(folder)):
        raise UserError(
            f"cache {folder}: is on {kind}, a network file system; choose a folder on a local "
            "disk with --cache"
        )
    if cache.limit is not None and cache.limit <= 0:
        raise UserError(f"cache {folder}: its limit is {cache.limit} bytes; it must be above 0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = CacheFolder(folder, cache.limit or 0)
        size = opened.count_bytes()
        if cache.limit is None:
            disk = os.statvfs(folder)
            opened.limit = int(DISK_SHARE * (disk.f_bavail * disk.f_frsize + size))
    except OSError as error:
        raise UserError(
            f"cache {folder}: cannot be used ({error.strerror or error}); choose a writable "
            "local folder with --cache"
        ) from error
    return opened


class ShardCache:
    """Prefetches the shards of a dataset and opens them from the local disk.

    `prefetch` starts threads, which end when its list is done; they are daemon threads and never
    keep the process from exiting.

    Args:
        dataset: a dataset at any URL that fsspec supports.
        cache: folder and limit.
        attempts, backoff: number of attempts per shard, and the seconds before the second one.

    Attributes:
        counts: number of "fetched" shards, their "bytes", and the shards that were "found" in the
            folder when they were opened.
        downloader: counts the retries in `retries`.

    Raises:
        UserError: the folder cannot be used.
    """

    is_private = True

    def __init__(
        self,
        dataset: ShardDataset,
        cache: Cache,
        attempts: int = ATTEMPTS,
        backoff: float = BACKOFF,
    ) -> None:
        self.dataset = dataset
        self.folder = open_folder(cache)
        self._closed = threading.Event()
        # At exit the store's sessions are closed by finalizers. Fetches that fail by that must not
        # be reported; a function that is registered after the first finalizer runs before all.
        weakref.finalize(self, self._closed.set)
        atexit.register(self._closed.set)
        self.downloader = Downloader(dataset, self._closed, attempts, backoff)
        log.info(self.description)
        self.counts: Counter[str] = Counter()
        self._rows = {row.shard: row for row in dataset.shards}
        self._side_bytes: dict[int, int] = {}  # only for shards that take more than was reserved
        self._is_warned = False
        self._start()

    def _start(self) -> None:
        """Start without threads: a forked process does not have those of its parent either."""
        self._process = os.getpid()
        self._state = threading.Condition()  # guards the attributes below
        self._queue: list[int] = []  # shards to fetch, in order
        self._needed: dict[str, int] = {}  # sha256 -> position in the list of `prefetch`
        self._fetching: set[int] = set()
        self._unreserved: set[int] = set()  # shards whose threads are looking for room
        self._errors: dict[int, BaseException] = {}
        self._threads = 0
        self._elsewhere = 0  # consecutive shards that other processes were fetching
        self._turn = threading.Lock()  # held by the one thread that is waiting to check again

    @property
    def description(self) -> str:
        """One line that says where shards are kept and how many bytes they may take."""
        return (
            f"{self.dataset.url}: shards are kept in {self.folder.folder}, at most "
            f"{format_gigabytes(self.folder.limit)} "
            f"({format_gigabytes(self.folder.count_bytes())} now); "
            "--cache and --cache-gb change this"
        )

    def estimate_bytes(self, row: ShardRow) -> int:
        """Return the bytes to reserve for a shard: tar, index and table."""
        side_bytes = self._side_bytes.get(row.shard, SIDE_BYTES * (row.samples + 64))
        return row.bytes + side_bytes

    def require(self, count: int) -> None:
        """Check that the shards that must be open at the same time fit.

        Args:
            count: their number; the largest shards are assumed.

        Raises:
            UserError: they do not fit; the message says how much they take.
        """
        largest = sorted(self.dataset.shards, key=self.estimate_bytes, reverse=True)[:count]
        if sum(map(self.estimate_bytes, largest)) > self.folder.limit:
            raise UserError(self._too_small(largest))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards in the background, in this order; replace the previous list.

        Fetches that have begun go on.
        """
        if self._process != os.getpid():
            self._start()
        with self._state:
            self._queue = [shard for shard in dict.fromkeys(shards) if shard in self._rows]
            self._needed = {
                self._rows[shard].sha256: position for position, shard in enumerate(self._queue)
            }
            self._errors.clear()
            for _ in range(self._threads, min(CONCURRENT_FETCHES, len(self._queue))):
                self._threads += 1
                threading.Thread(
                    target=run_fetcher,
                    args=(weakref.ref(self), self._turn),
                    name="fetch",
                    daemon=True,
                ).start()

    def open(self, shard: int) -> ShardFiles:
        """Open the files of a shard, waiting until they are local.

        Raises:
            UserError: the shard cannot be fetched or does not fit; the message names it.
        """
        row, is_local = self._rows[shard], True
        while (files := self._open_local(row)) is None:
            is_local = False
            with self._state:
                self._state.wait_for(lambda: shard not in self._fetching)
                if error := self._errors.pop(shard, None):
                    raise error
                if self.folder.is_present(row):
                    continue
                self._fetching.add(shard)
            outcome, error = self._try_fetch(shard, is_urgent=True)
            if error is not None:
                raise error
            if outcome is Refusal.FETCHED_ELSEWHERE:
                self.folder.wait_for_fetch(row)
            elif outcome is Refusal.FULL:
                time.sleep(POLL_SECONDS)  # all room is reserved by fetches, which will end
        with self._state:
            self.counts["found"] += is_local
            self._needed.pop(row.sha256, None)
        return files

    def _open_local(self, row: ShardRow) -> ShardFiles | None:
        try:
            return self.folder.open(row)
        except OSError as error:
            raise self._local_error(row, error) from error

    def _fetch_next(self) -> float | None:
        """Fetch the next shard of the list, if that is possible now.

        Returns:
            Seconds to wait before the next call; None when the list is done.
        """
        with self._state:
            waiting = [shard for shard in self._queue if shard not in self._fetching]
            if not waiting:
                self._threads -= 1
                return None
            shard = waiting[0]
            self._fetching.add(shard)
            self._unreserved.add(shard)
        outcome, error = self._try_fetch(shard, is_urgent=False)
        with self._state:
            is_listed = shard in self._queue  # False if the list was replaced meanwhile
            if error is None and outcome is Refusal.FETCHED_ELSEWHERE:
                # try the others first, so that ranks with the same order fetch different shards
                self._elsewhere += 1
                if is_listed:
                    self._queue.append(self._queue.pop(self._queue.index(shard)))
                must_wait = self._elsewhere >= len(waiting)
            else:
                self._elsewhere = 0
                must_wait = error is None and outcome is Refusal.FULL
                if is_listed and not must_wait:
                    self._queue.remove(shard)
        return POLL_SECONDS if must_wait else 0.0

    def _is_next(self, shard: int) -> bool:
        """Return whether all shards before this one in the list have their room reserved."""
        before = self._queue[: self._queue.index(shard)] if shard in self._queue else []
        return self._unreserved.isdisjoint(before)

    def _try_fetch(
        self, shard: int, is_urgent: bool
    ) -> tuple[Refusal | None, BaseException | None]:
        """Fetch a shard that is in `_fetching`, and remove it from there.

        Returns:
            The reason if it was not fetched, and the error if there was one. An error in the
            background is stored until the shard is opened.
        """
        outcome, failure = None, None
        try:
            outcome = self._fetch(self._rows[shard], is_urgent)
        except BaseException as error:
            failure = error
        with self._state:
            self._fetching.discard(shard)
            self._unreserved.discard(shard)
            if failure is not None and not is_urgent:
                self._errors[shard] = failure
            self._state.notify_all()
        return outcome, failure

    def _fetch(self, row: ShardRow, is_urgent: bool) -> Refusal | None:
        """Fetch a shard into the folder; return None, or the reason if it was not fetched.

        Raises:
            UserError: the store keeps failing, the disk is full, or the shard does not fit.
        """
        size = self.estimate_bytes(row)
        if size > self.folder.limit:
            raise UserError(self._too_small([row]))
        try:
            with self._state:
                needed = dict(self._needed)
                # a shard must not take the room of one that is needed sooner
                self._state.wait_for(lambda: is_urgent or self._is_next(row.shard))
            try:
                part = self.folder.reserve(row, size, needed, is_urgent)
            finally:
                with self._state:
                    self._unreserved.discard(row.shard)
                    self._state.notify_all()
            if isinstance(part, Refusal):
                if part is Refusal.PRESENT and not is_urgent:
                    self.folder.note_use(row)
                return part
            self._warn_of_eviction_in_use()
            try:
                idx, parquet = self.downloader.download(row, part.path)
                side_bytes = len(idx) + len(parquet)
                if row.bytes + side_bytes > part.reserved:
                    self._side_bytes[row.shard] = side_bytes
                    self.folder.abandon(part)
                    return Refusal.FULL  # for now: the next attempt reserves its actual size
            except BaseException:
                self.folder.abandon(part)
                raise
            self.folder.commit(part, row, idx, parquet)
        except OSError as error:
            raise self._local_error(row, error) from error
        with self._state:
            self.counts.update(fetched=1, bytes=row.bytes)
        return None

    def _too_small(self, rows: Sequence[ShardRow]) -> str:
        name = (
            f"shard {rows[0].shard}" if len(rows) == 1 else f"the {len(rows)} shards open at once"
        )
        total = sum(map(self.estimate_bytes, rows))
        return (
            f"cache {self.folder.folder}: too small: {name} of {self.dataset.url} can take "
            f"{format_gigabytes(total)} ({total} bytes), and its limit is "
            f"{format_gigabytes(self.folder.limit)}; raise it with --cache-gb"
        )

    def _local_error(self, row: ShardRow, error: OSError) -> UserError:
        if error.errno in DISK_FULL:
            reason = (
                f"no space left on the disk; free some, lower --cache-gb (now "
                f"{self.folder.limit / 1e9:g}) or choose another folder with --cache"
            )
        elif error.errno == errno.EMFILE:
            reason = TOO_MANY_FILES
        else:
            reason = f"{error.strerror or error}; choose another local folder with --cache"
        return UserError(f"cache {self.folder.folder}: shard {row.shard}: {reason}")

    def _warn_of_eviction_in_use(self) -> None:
        with self._state:
            must_warn = self.folder.evicted_in_use > 0 and not self._is_warned
            self._is_warned |= must_warn
        if must_warn:
            log.warning(
                f"cache {self.folder.folder}: {format_gigabytes(self.folder.limit)} are too few "
                "for all shards that are open at once; evicted shards take disk space until they "
                "are closed"
            )


def run_fetcher(reference: "weakref.ref[ShardCache]", turn: threading.Lock) -> None:
    """Fetch shards until the list is done or the cache has been garbage-collected."""
    while (cache := reference()) is not None:
        seconds = cache._fetch_next()
        del cache
        if seconds is None:
            return
        if seconds:
            with turn:  # one thread at a time, so that waiting threads cost next to nothing
                time.sleep(seconds)


def format_gigabytes(count: int) -> str:
    """Format a number of bytes in gigabytes."""
    return f"{count / 1e9:.3g} GB"
