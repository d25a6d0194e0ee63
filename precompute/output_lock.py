"""Keep a second job out of the output folder of a running one."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from schemas.errors import UserError
from schemas.storage import Store

LOCK = ".lock"
LOCK_SECONDS = 10
"""Seconds to wait for another job that is just ending in the same folder."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def lock_output(store: Store) -> Iterator[None]:
    """Keep other jobs out of a local folder while this one runs, however it ends.

    A store, and a file system that does not support locks, cannot be locked. There a second job of
    other settings is noticed when the shards are merged (`refuse_shard_of_other_job`).

    Raises:
        UserError: another job is writing there.
    """
    if not store.is_local:
        yield
        return
    store.make_folder("")
    lock = FileLock(store.path(LOCK))
    with store.translate_write_errors(LOCK):
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise UserError(
                f"{store.url}: another precompute job is writing here; wait for it, or choose "
                "another OUT"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()
