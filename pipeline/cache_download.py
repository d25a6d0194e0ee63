"""Download shards: one request per file, verification against the tables, and retries."""

import errno
import logging
import os
import random
import threading
from hashlib import file_digest
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from pipeline.shard_contents import DamagedShardError, parse_shard_contents
from schemas import ShardDataset, ShardRow, UserError
from schemas.errors import summarize_error
from schemas.storage import TRANSIENT_STATUS, Store
from schemas.tables import shard_name

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Attempts per shard before the store counts as broken (our choice)."""

BACKOFF = 1.0
LONGEST_WAIT = 30.0
"""Seconds before the second attempt, doubled for each further one, and the maximum (our choice)."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

SILENCE_SECONDS = 60.0
"""Seconds without a byte after which an HTTP request counts as broken."""

JITTER_RNG = random.Random()
"""A separate generator, because the seed and state of the global one belong to the user."""

BUGS = (ArithmeticError, AssertionError, AttributeError, NameError, TypeError)
"""Errors that indicate a bug in this code; they are not retried."""


class Downloader:
    """Downloads the shards of a dataset.

    Args:
        closed: set when shards are no longer needed; ends the retries.
        attempts, backoff: number of attempts per shard, and the seconds before the second one,
            doubled for each further one.

    Attributes:
        retries: number of retries of all shards.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        closed: threading.Event,
        attempts: int = ATTEMPTS,
        backoff: float = BACKOFF,
    ) -> None:
        self.dataset, self.store, self.closed = dataset, dataset.store, closed
        self.attempts, self.backoff = attempts, backoff
        self.retries = 0
        self._process: int | None = None

    @property
    def fs(self) -> Any:
        """The configured file system; another one in a forked process, where the first fails."""
        if self._process != os.getpid():
            self._fs, self._process = configure_file_system(self.store), os.getpid()
        return self._fs

    def download(self, row: ShardRow, target: Path) -> tuple[bytes, bytes]:
        """Download the tar of a shard into `target`; return its index and table.

        Raises:
            UserError: the store refuses the request, or keeps failing.
            OSError: the local file cannot be written, for example because the disk is full.
        """
        tar = self.store.location(shard_name(row.shard, "tar"))
        for attempt in range(1, self.attempts + 1):
            try:
                return self._download_once(row, target)
            except (UserError, *BUGS):
                raise
            except Exception as error:
                if is_disk_error(error, target):
                    raise
                reason = summarize_error(error)
                if not is_transient(error):
                    raise UserError(f"{tar}: shard {row.shard} is refused: {reason}") from error
                if attempt == self.attempts or self.closed.is_set():
                    raise UserError(
                        f"{tar}: shard {row.shard} cannot be fetched, {attempt} attempts failed; "
                        f"the last one: {reason}"
                    ) from error
                self.retries += 1
                delay = min(LONGEST_WAIT, self.backoff * 2 ** (attempt - 1)) * JITTER_RNG.uniform(
                    0.5, 1.5
                )
                log.warning(
                    f"{tar}: attempt {attempt} of {self.attempts} failed ({reason}); "
                    f"the next one in {delay:.1f} s"
                )
                self.closed.wait(delay)
        raise AssertionError("unreachable")

    def _download_once(self, row: ShardRow, target: Path) -> tuple[bytes, bytes]:
        """Download a shard once and compare it with the tables; errors of the store propagate."""
        store, side_files, name = self.store, [], ""
        try:
            for suffix in ("idx", "parquet"):
                name = shard_name(row.shard, suffix)
                side_files.append(self.fs.cat_file(store.path(name)))
            name = shard_name(row.shard, "tar")
            self.fs.get_file(store.path(name), str(target), callback=SizeLimit(row.bytes))
        except FileNotFoundError as error:
            if is_disk_error(error, target):
                raise
            raise UserError(f"{store.location(name)}: shard {row.shard} is missing") from error
        idx, parquet = side_files
        try:
            parse_shard_contents(row, idx, parquet, f"{row.shard:06d}")
        except DamagedShardError as error:
            raise WrongBytes(str(error)) from error
        size = target.stat().st_size
        if size != row.bytes:
            raise WrongBytes(f"received {size} bytes, the table says {row.bytes}")
        with target.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
        if sha256 != row.sha256:
            raise WrongBytes(
                f"its sha256 is {sha256}, the table says {row.sha256}; `saliency-shards verify "
                f"{self.dataset.url}` lists all that is wrong"
            )
        return idx, parquet


class WrongBytes(Exception):
    """The store sent a file that does not match the tables."""


class SizeLimit(Callback):
    """Aborts a download that exceeds the size in the table, for which room was reserved."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.limit:
            raise WrongBytes(f"received more than the {self.limit} bytes in the table")


def configure_file_system(store: Store) -> Any:
    """Return the file system of a store, configured to fetch a large file with one request.

    By default, s3fs requests ranges of 50 MB and holds ten of them in memory, botocore retries by
    its own rules, and fsspec aborts HTTP requests after five minutes.
    """
    protocol = store.fs.protocol
    protocols = {protocol} if isinstance(protocol, str) else set(protocol)
    options = dict(store.fs.storage_options)
    if "s3" in protocols:
        config = {"retries": {"total_max_attempts": 1}} | options.get("config_kwargs", {})
        options |= {"max_concurrency": 1, "config_kwargs": config}
    elif "http" in protocols:
        from aiohttp import ClientTimeout  # fsspec needs it for HTTP only

        timeout = ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options["client_kwargs"] = {"timeout": timeout} | options.get("client_kwargs", {})
    else:
        return store.fs
    return type(store.fs)(**options)


def is_disk_error(error: Exception, target: Path) -> bool:
    """Return whether an error comes from the local disk, not from the store."""
    if not isinstance(error, OSError):
        return False
    name = error.filename
    return error.errno in DISK_FULL or (name is not None and str(name) == str(target))


def is_transient(error: Exception) -> bool:
    """Return whether a retry may help; it does not if the store refuses the request itself."""
    status = getattr(error, "status", None)
    is_refused = isinstance(status, int) and 400 <= status < 500
    return not isinstance(error, PermissionError) and (not is_refused or status in TRANSIENT_STATUS)
