"""Test the lock of a folder: it is exclusive, ends with its holder, and may be unsupported."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from schemas import UserError
from schemas.folder_lock import lock_folder


def test_only_one_job_holds_the_lock(tmp_path: Path) -> None:
    first = lock_folder(tmp_path, 0.1, "unused")
    with pytest.raises(UserError, match=r"^the folder is taken$"):
        lock_folder(tmp_path, 0.1, "the folder is taken")
    first.release()
    lock_folder(tmp_path, 0.1, "the folder is taken").release()


def make_flock_fail(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    make_flock_fail(monkeypatch, number)
    assert lock_folder(tmp_path, 0.1, "unused") is None


def test_another_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_flock_fail(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        lock_folder(tmp_path, 0.1, "unused")
