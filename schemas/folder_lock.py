"""Lock a local folder, so that only one job writes there. Needs the package filelock."""

import errno
from pathlib import Path

from filelock import FileLock, Timeout

from schemas.errors import UserError

LOCK = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of a file system that does not support locks, such as NFS without its lock service."""


def lock_folder(folder: Path, seconds: float, refusal: str) -> FileLock | None:
    """Keep other jobs out of a folder until the lock is released or this process ends.

    Args:
        folder: an existing local folder; a file `.lock` is created in it.
        seconds: time to wait for another job that is just ending in the same folder.
        refusal: the error message if that job does not end.

    Returns:
        The acquired lock, or None if the file system does not support locks.

    Raises:
        UserError: another job holds the lock.
        OSError: the file of the lock cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise UserError(refusal) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return lock
