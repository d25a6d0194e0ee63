"""Downloads of a shard: each file as one request, compared with the tables, tried again."""

import errno
import logging
import random
import threading
from hashlib import file_digest
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from schemas import ShardDataset, ShardRow, UserError
from schemas.shard import INDEX_VERSION
from schemas.storage import Store
from schemas.tables import shard_name

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often a shard is tried before the store counts as broken (ours)."""

BACKOFF = 1.0
LONGEST_WAIT = 30.0
"""Seconds before the second attempt, doubled for each further one, and their bound (ours)."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

TRANSIENT_4XX = (408, 425, 429)
"""Client errors of HTTP that another attempt may mend: timeout, too early, too many requests."""

SILENCE = 60.0
"""Seconds without a byte after which an HTTP request counts as broken."""

PARQUET_MAGIC = b"PAR1"

JITTER = random.Random()
"""Apart from the global generator, whose seed and state are the user's."""

BUGS = (ArithmeticError, AssertionError, AttributeError, NameError, TypeError)


class Downloader:
    """Downloads shards of a dataset.

    Args:
        attempts, backoff: how often a shard is tried, and the seconds before the second attempt,
            doubled for each further one.
        closed: set when nobody waits for a shard any more; ends the attempts.

    Attributes:
        retries: number of attempts after the first of each shard.
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
        self.fs = whole_file_system(dataset.store)
        self.retries = 0

    def download(self, row: ShardRow, target: Path) -> tuple[bytes, bytes]:
        """Download a tar into `target`; return index and table.

        Raises:
            UserError: the store refuses, or stays broken.
            OSError: the local disk is full or refuses.
        """
        tar = self.store.location(shard_name(row.shard, "tar"))
        for attempt in range(1, self.attempts + 1):
            try:
                return self._download_once(row, target)
            except (UserError, *BUGS):
                raise
            except Exception as error:
                if is_local(error, target):
                    raise
                reason = first_line(error)
                if not is_transient(error):
                    raise UserError(f"{tar}: shard {row.shard} is refused: {reason}") from error
                if attempt == self.attempts or self.closed.is_set():
                    raise UserError(
                        f"{tar}: shard {row.shard} cannot be fetched, {attempt} attempts failed; "
                        f"the last one: {reason}"
                    ) from error
                self.retries += 1
                delay = min(LONGEST_WAIT, self.backoff * 2 ** (attempt - 1)) * JITTER.uniform(
                    0.5, 1.5
                )
                log.warning(
                    f"{tar}: attempt {attempt} of {self.attempts} failed ({reason}); "
                    f"the next one in {delay:.1f} s"
                )
                self.closed.wait(delay)
        raise AssertionError("unreachable")

    def _download_once(self, row: ShardRow, target: Path) -> tuple[bytes, bytes]:
        """Download a shard once and compare it with the tables. Raises what the store raises."""
        store, sides, name = self.store, [], ""
        try:
            for suffix in ("idx", "parquet"):
                name = shard_name(row.shard, suffix)
                sides.append(self.fs.cat_file(store.path(name)))
            name = shard_name(row.shard, "tar")
            self.fs.get_file(store.path(name), str(target), callback=SizeLimit(row.bytes))
        except FileNotFoundError as error:
            if is_local(error, target):
                raise
            raise UserError(f"{store.location(name)}: shard {row.shard} is missing") from error
        idx, parquet = sides
        head, *lines = idx.split(b"\n")
        if head != f"{INDEX_VERSION} {row.samples}".encode() or len(lines) != row.samples + 1:
            raise WrongBytes(f"its index is not one of {row.samples} samples")
        if not (parquet.startswith(PARQUET_MAGIC) and parquet.endswith(PARQUET_MAGIC)):
            raise WrongBytes("its table is not a whole parquet file")
        size = target.stat().st_size
        if size != row.bytes:
            raise WrongBytes(f"{size} bytes came, the table says {row.bytes}")
        with target.open("rb") as file:
            sha256 = file_digest(file, "sha256").hexdigest()
        if sha256 != row.sha256:
            raise WrongBytes(
                f"its sha256 is {sha256}, the table says {row.sha256}; `python -m schemas verify "
                f"{self.dataset.url}` shows all that is wrong"
            )
        return idx, parquet


class WrongBytes(Exception):
    """What the store sent is not what the tables say."""


class SizeLimit(Callback):
    """Ends a download that brings more bytes than the table says: there is no room for them."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.limit:
            raise WrongBytes(f"more than the {self.limit} bytes that the table says came")


def whole_file_system(store: Store) -> Any:
    """Return the file system of a store, set to bring a large file by one request.

    s3fs would make ranges of 50 MB and hold ten of them in memory, and botocore would retry by its
    own rules; over HTTP, fsspec gives up a request that lasts five minutes.
    """
    protocol = store.fs.protocol
    protocols = {protocol} if isinstance(protocol, str) else set(protocol)
    options = dict(store.fs.storage_options)
    if "s3" in protocols:
        config = {"retries": {"total_max_attempts": 1}} | options.get("config_kwargs", {})
        options |= {"max_concurrency": 1, "config_kwargs": config}
    elif "http" in protocols:
        from aiohttp import ClientTimeout  # here: fsspec needs it for HTTP only

        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        options["client_kwargs"] = {"timeout": timeout} | options.get("client_kwargs", {})
    else:
        return store.fs
    return type(store.fs)(**options)


def is_local(error: Exception, target: Path) -> bool:
    """Tell whether an error is the local disk's, not the store's."""
    if not isinstance(error, OSError):
        return False
    name = error.filename
    return error.errno in DISK_FULL or (name is not None and str(name) == str(target))


def is_transient(error: Exception) -> bool:
    """Tell whether another attempt may help: not where the store refuses the request itself."""
    status = getattr(error, "status", None)
    is_refused = isinstance(status, int) and 400 <= status < 500
    return not isinstance(error, PermissionError) and (not is_refused or status in TRANSIENT_4XX)


def first_line(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__
