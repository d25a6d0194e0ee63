"""Keep a second job out of the output folder of a running one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.folder_lock import LOCK, lock_folder
from schemas.storage import Store

LOCK_SECONDS = 10
"""Seconds to wait for another job that is just ending in the same folder."""


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
    with store.translate_write_errors(LOCK):
        lock = lock_folder(
            Path(store.path("")),
            LOCK_SECONDS,
            f"{store.url}: another precompute job is writing here; wait for it, or choose another "
            "OUT",
        )
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
