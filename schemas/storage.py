"""One folder of files behind an fsspec URL, written atomically."""

import errno
import os
import posixpath
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import UserError, summarize_error
from schemas.streams import RangeReader, StoreWriter, sync_folder

T = TypeVar("T")

TEMPORARY_SUFFIX = ".tmp"
TEMPORARY_NAME = re.compile(rf".+\.[0-9a-f]{{8}}\{TEMPORARY_SUFFIX}")
STORE_ADVICE = "look at its address, your keys and the network"
DISK_ADVICE = "look at its permissions and at the disk"
OPEN_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Prefixes of files that this process already has open, such as a shell's `<(find ...)`."""
IRREGULAR = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


RETRY_DELAYS = (0.5, 2.0)
"""Seconds to wait before a request over HTTP is repeated (our choice). The drivers of object stores
repeat requests themselves."""

TRANSIENT_STATUS = {408, 425, 429, *range(500, 600)}
"""HTTP status of an error that may not recur: timeout, too early, too many requests, and all
errors of the server."""


class NotAFileError(OSError):
    """The path to be read is a pipe, a socket or a device; it was not opened."""


class Store:
    """Read and write files below one folder, by names relative to it.

    Args:
        url: a plain path or any fsspec URL (`s3://bucket/folder`, `memory://folder` ...).

    Raises:
        UserError: the URL's protocol is unknown or its driver is not installed.
    """

    def __init__(self, url: str | Path):
        if not str(url):
            raise UserError("the name of a folder is empty; give a path or a URL")
        self.url = str(url).rstrip("/") or "/"
        try:
            # A cached listing would hide files that other processes write later.
            self._fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {error}") from error
        self._process = os.getpid()
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self.followed: list[str] = []  # links to folders that `walk` has followed
        self.root = os.path.abspath(self.root) if self.is_local else self.root.rstrip("/")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The driver of the file system; another one in a forked process, where the first fails."""
        if self._process != os.getpid():
            self._fs, _ = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            self._process = os.getpid()
        return self._fs

    def path(self, name: str) -> str:
        """Return the file system's own path of a file in this folder."""
        return posixpath.join(self.root, name) if name else self.root

    def location(self, name: str) -> str:
        """Return the location for other tools: a plain path for a local folder, otherwise a URL."""
        return self.path(name) if self.is_local else self.fs.unstrip_protocol(self.path(name))

    @contextmanager
    def translate_driver_errors(self) -> Iterator[None]:
        """Turn the failure to reach a store (no key, no network) into a one-line error.

        Drivers raise OSErrors for what a store answers, and their own exceptions for everything
        else.

        Raises:
            UserError: the store does not answer.
        """
        try:
            yield
        except (OSError, UserError):
            raise
        except Exception as error:
            if self.is_local:
                raise
            raise UserError(
                f"{self.url}: the store does not answer ({summarize_error(error)}); {STORE_ADVICE}"
            ) from error

    @contextmanager
    def translate_read_errors(self, name: str) -> Iterator[None]:
        """Turn the reason why a file or folder cannot be read into a one-line error.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: a pipe or a device, no permission, keys that the store refuses, or a failing
                disk.
        """
        try:
            with self.translate_driver_errors():
                yield
        except FileNotFoundError:
            raise
        except NotAFileError as error:
            raise UserError(f"{self.location(name)}: {error}") from error
        except OSError as error:
            advice = DISK_ADVICE if self.is_local else STORE_ADVICE
            reason = summarize_error(error)
            raise UserError(
                f"{self.location(name)}: cannot be read ({reason}); {advice}"
            ) from error

    def exists(self, name: str) -> bool:
        with self.translate_read_errors(name):
            return self.fs.exists(self.path(name))

    def is_folder(self, name: str) -> bool:
        with self.translate_read_errors(name):
            return self.fs.isdir(self.path(name))

    def glob(self, url: str) -> list[str]:
        """Return the sorted names that match a pattern: a path or URL below this folder."""
        with self.translate_read_errors(""):
            paths = self.fs.glob(Store(url).root, detail=False)
        return sorted(posixpath.relpath(path, self.root) for path in paths)

    def size(self, name: str) -> int:
        """Return the size of a file in bytes. Raises OSError."""
        with self.translate_driver_errors():
            return retry(lambda: self.fs.info(self.path(name)))["size"]

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the whole file, or its bytes from `start` up to `end`.

        Raises:
            FileNotFoundError: there is no such file.
            NotAFileError: it is a pipe, a socket or a device, which might never end.
            OSError: it cannot be read; `translate_read_errors` turns this into a UserError.
        """
        if self.is_local:
            check_regular(self.path(name))
            # fsspec takes several times as long for a small file, or a small part of one. A buffer
            # gains nothing for a whole file; for a part it repeats reads that return too little.
            with open(self.path(name), "rb", buffering=0 if end is None else -1) as file:
                file.seek(start or 0)
                return file.read() if end is None else file.read(end - (start or 0))
        with self.translate_driver_errors():
            # Keyword arguments: the second positional argument of s3fs is a version.
            return retry(lambda: self.fs.cat_file(self.path(name), start=start, end=end))

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading. Raises OSError, as `read` does."""
        if self.is_local and not self.path(name).startswith(OPEN_DESCRIPTORS):
            check_regular(self.path(name))
        with self.translate_driver_errors():
            return self.fs.open(self.path(name), "rb")

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the names and sizes in bytes of the files directly in `folder`, sorted by name.

        The names are relative to `folder`. A link to a file counts as that file.
        """
        if not self.is_folder(folder):
            return {}
        files = {}
        with self.translate_read_errors(folder):
            if self.is_local:  # fsspec gives links a type of their own
                with os.scandir(self.path(folder)) as entries:
                    for entry in filter(os.DirEntry.is_file, entries):
                        with suppress(FileNotFoundError):  # a writer has renamed it meanwhile
                            files[entry.name] = entry.stat().st_size
            else:
                for info in self.fs.ls(self.path(folder), detail=True):
                    if info["type"] == "file":
                        files[posixpath.basename(info["name"])] = info["size"]
        return dict(sorted(files.items()))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all entries directly in `folder` that are not folders."""
        if not self.is_local:
            return list(self.sizes(folder))
        with self.translate_read_errors(folder), os.scandir(self.path(folder)) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly in this one."""
        with self.translate_read_errors(""):
            entries = self.fs.ls(self.root, detail=True)
            # A link has its own type; asking about every file would cost one request each.
            paths = [
                entry["name"].rstrip("/")
                for entry in entries
                if entry["type"] == "directory"
                or (entry["type"] != "file" and self.fs.isdir(entry["name"]))
            ]
        return sorted(map(posixpath.basename, paths))

    def walk(self, folder: str = "") -> Iterator[str]:
        """Yield the names of all files below a folder at any depth, in a fixed order; follow links.

        Raises:
            UserError: a folder cannot be listed, or links form a cycle.
        """
        if not self.is_local:
            with self.translate_read_errors(folder):
                paths = sorted(self.fs.find(self.path(folder)))
            yield from (posixpath.relpath(path, self.root) for path in paths)
            return

        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

        # the folders that lead to the current one, each with its real path
        path: list[tuple[str, str]] = []
        for directory, folders, names in os.walk(self.path(folder), onerror=fail, followlinks=True):
            while path and not directory.startswith(os.path.join(path[-1][0], "")):
                path.pop()
            path.append((directory, os.path.join(os.path.realpath(directory), "")))
            for link in filter(os.path.islink, (os.path.join(directory, name) for name in folders)):
                target = os.path.join(os.path.realpath(link), "")
                if any(real.startswith(target) for _, real in path):
                    raise UserError(f"{link}: leads back to a folder that holds it; remove it")
                self.followed.append(link)
            folders.sort()
            for name in sorted(names):
                yield os.path.relpath(os.path.join(directory, name), self.root)

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file so that readers see either all of it or nothing.

        On a local disk: temporary name, fsync, rename, fsync of the folder. Object stores commit a
        file as a whole when it is closed, so there it is one put.

        Raises:
            UserError: no space left, or no permission.
        """
        with self.translate_write_errors(name):
            if self.is_local:
                write_atomically(Path(self.path(name)), content)
            else:
                self.fs.pipe_file(self.path(name), content)

    def write_stream(self, name: str) -> StoreWriter:
        """Open a new file to be written piece by piece in a `with` block; see `StoreWriter`."""
        return StoreWriter(self, name, TEMPORARY_SUFFIX)

    def read_ranges(self, name: str) -> RangeReader:
        """Open a file of which only parts are needed. Raises FileNotFoundError."""
        return RangeReader(self, name)

    @contextmanager
    def translate_write_errors(self, name: str) -> Iterator[None]:
        """Turn the reason why a file cannot be written into a one-line error. Raises UserError."""
        with translate_os_errors(self.location(name)), self.translate_driver_errors():
            yield

    def make_folder(self, name: str) -> None:
        """Create a folder, and check early that it is writable. Raises UserError."""
        with self.translate_write_errors(name):
            self.fs.makedirs(self.path(name), exist_ok=True)
            if self.is_local and not os.access(self.path(name), os.W_OK):
                raise PermissionError(self.path(name))

    def remove(self, name: str) -> None:
        """Delete a file if it exists. Raises UserError."""
        if self.exists(name):
            with self.translate_write_errors(name):
                self.fs.rm_file(self.path(name))

    def remove_folder(self, name: str = "") -> None:
        """Delete a folder inside this one, or this one, with all its content. Raises UserError."""
        if self.exists(name):
            with self.translate_write_errors(name):
                self.fs.rm(self.path(name), recursive=True)

    def remove_empty_folder(self, name: str) -> None:
        """Delete a folder inside this one if it exists and has no content."""
        if not self.is_folder(name):
            return
        with self.translate_driver_errors():
            if not self.fs.ls(self.path(name), detail=False):
                with suppress(OSError):  # another process has written to it meanwhile
                    self.fs.rmdir(self.path(name))

    def remove_temporaries(self, folder: str) -> int:
        """Delete the unfinished files of killed writers; return their number.

        Only a local folder has any, see `write` and `StoreWriter`.
        """
        if not self.is_local:
            return 0
        names = [name for name in self.sizes(folder) if TEMPORARY_NAME.fullmatch(name)]
        for name in names:
            self.fs.rm_file(self.path(posixpath.join(folder, name)))
        return len(names)


def retry(request: Callable[[], T]) -> T:
    """Return the result of a request, repeating it after HTTP errors that may not recur."""
    for delay in RETRY_DELAYS:
        try:
            return request()
        except Exception as error:
            # a connection that breaks has no status; its class belongs to aiohttp, as of fsspec
            status = getattr(error, "status", None)
            has_broken = status is None and type(error).__module__.startswith("aiohttp")
            if status not in TRANSIENT_STATUS and not has_broken:
                raise
            time.sleep(delay)
    return request()


def check_regular(path: str) -> None:
    """Raise NotAFileError for a pipe, a socket or a device, without opening it.

    Raises:
        OSError: there is nothing at this path, or it is a folder.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if kind != stat.S_IFREG:
        raise NotAFileError(f"{IRREGULAR.get(kind, 'no regular file')}; only files are read")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a local file, durably, so that readers see either all of it or nothing.

    Raises:
        OSError: no space left, or no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name for each attempt: two writers of one shard must not share a temporary file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def translate_os_errors(location: str) -> Iterator[None]:
    """Turn an error of the file system into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "no space left; free some or choose another folder, then run the command again"
        elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
            advice = "no permission to write; choose a folder that you may write to"
        elif isinstance(error, (NotADirectoryError, FileExistsError)):
            advice = "a file is in the way of a folder; choose another folder"
        else:
            advice = f"cannot be written ({error}); choose another folder"
        raise UserError(f"{location}: {advice}") from error
