"""One folder of files behind an fsspec URL, written atomically."""

import errno
import os
import posixpath
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import UserError
from schemas.streams import RangeReader, StoreWriter, sync_folder

TEMPORARY_SUFFIX = ".tmp"
OPEN_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Paths of what this process has open already, such as a shell's `<(find ...)`."""
IRREGULAR = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFileError(OSError):
    """What is to be read is a pipe, a socket or a device; it was not opened."""


class Store:
    """Reads and writes files below one folder, by names relative to it.

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
            # a listing that is kept would hide what other processes write after it
            self.fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {error}") from error
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.followed: list[str] = []  # links to folders that `walk` has gone through
        self.root = os.path.abspath(self.root) if self.is_local else self.root.rstrip("/")

    def path(self, name: str) -> str:
        """The file system's own path of a file in this folder."""
        return posixpath.join(self.root, name) if name else self.root

    def location(self, name: str) -> str:
        """A plain path for a local folder, otherwise a URL: what other tools are given."""
        return self.path(name) if self.is_local else self.fs.unstrip_protocol(self.path(name))

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Turn what is no answer of a store (no key, no network) into one line.

        Drivers raise OSErrors for what a store answers, and errors of their own for all else.

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
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.url}: the store does not answer ({reason}); look at its address, your keys "
                "and the network"
            ) from error

    def exists(self, name: str) -> bool:
        with self.answers():
            return self.fs.exists(self.path(name))

    def is_folder(self, name: str) -> bool:
        with self.answers():
            return self.fs.isdir(self.path(name))

    def glob(self, url: str) -> list[str]:
        """Names of what a pattern finds, which is a path or URL below this folder, sorted."""
        with self.answers():
            found = self.fs.glob(Store(url).root, detail=False)
        return sorted(posixpath.relpath(path, self.root) for path in found)

    def size(self, name: str) -> int:
        """Size in bytes. Raises FileNotFoundError."""
        with self.answers():
            return self.fs.info(self.path(name))["size"]

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the whole file, or its bytes from `start` up to `end`.

        Raises:
            FileNotFoundError: there is none.
            NotAFileError: it is a pipe, a socket or a device, which might never end.
        """
        if self.is_local:
            check_regular(self.path(name))
            if start is None and end is None:
                # fsspec takes a multiple of the time that a small file itself takes
                return Path(self.path(name)).read_bytes()
        with self.answers():
            # by name: the second argument of s3fs is a version
            return self.fs.cat_file(self.path(name), start=start, end=end)

    def open(self, name: str) -> BinaryIO:
        """The file, open for reading. Raises FileNotFoundError, NotAFileError."""
        if self.is_local and not self.path(name).startswith(OPEN_DESCRIPTORS):
            check_regular(self.path(name))
        with self.answers():
            return self.fs.open(self.path(name), "rb")

    def sizes(self, folder: str) -> dict[str, int]:
        """Names (relative to `folder`) and sizes in bytes of the files directly in it, sorted."""
        if not self.is_folder(folder):
            return {}
        with self.answers():
            entries = self.fs.ls(self.path(folder), detail=True)
        files = {posixpath.basename(e["name"]): e["size"] for e in entries if e["type"] == "file"}
        return dict(sorted(files.items()))

    def names(self, folder: str) -> list[str]:
        """Names of all that lies directly in a folder and is none, whatever it is, sorted."""
        if not self.is_local:
            return list(self.sizes(folder))
        with os.scandir(self.path(folder)) as entries:
            return sorted(entry.name for entry in entries if not entry.is_dir())

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted."""
        with self.answers():
            entries = self.fs.ls(self.root, detail=True)
            # a link has a type of its own; to ask about every file would be a request each
            found = [
                entry["name"].rstrip("/")
                for entry in entries
                if entry["type"] == "directory"
                or (entry["type"] != "file" and self.fs.isdir(entry["name"]))
            ]
        return sorted(map(posixpath.basename, found))

    def walk(self, folder: str = "") -> Iterator[str]:
        """Names of all files below a folder, however deep, in a fixed order; links are followed.

        Raises:
            UserError: a folder that cannot be listed, or links that lead in a circle.
        """
        if not self.is_local:
            with self.answers():
                found = sorted(self.fs.find(self.path(folder)))
            yield from (posixpath.relpath(path, self.root) for path in found)
            return

        def fail(error: OSError) -> None:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error

        for here, folders, names in os.walk(self.path(folder), onerror=fail, followlinks=True):
            real = os.path.realpath(here) + "/"
            for link in filter(os.path.islink, (os.path.join(here, name) for name in folders)):
                if real.startswith(os.path.realpath(link) + "/"):
                    raise UserError(f"{link}: leads back to a folder that holds it; remove it")
                self.followed.append(link)
            folders.sort()
            for name in sorted(names):
                yield os.path.relpath(os.path.join(here, name), self.root)

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file such that a reader sees all of it or nothing.

        On a local disk: temporary name, fsync, rename, fsync of the folder. Object stores commit a
        file as one when it is closed, so there it is one put.

        Raises:
            UserError: no space left, or no permission.
        """
        with self.writes(name):
            if self.is_local:
                write_locally(Path(self.path(name)), content)
            else:
                self.fs.pipe_file(self.path(name), content)

    def write_stream(self, name: str) -> StoreWriter:
        """Open a new file to be written piece by piece in a `with` block; see `StoreWriter`."""
        return StoreWriter(self, name, TEMPORARY_SUFFIX)

    def read_ranges(self, name: str) -> RangeReader:
        """Open a file of which only parts are needed. Raises FileNotFoundError."""
        return RangeReader(self, name)

    @contextmanager
    def writes(self, name: str) -> Iterator[None]:
        """Turn the reason why a file cannot be written into one line. Raises UserError."""
        with explained(self.location(name)), self.answers():
            yield

    def make_folder(self, name: str) -> None:
        """Make a folder, and find out early whether it can be written to. Raises UserError."""
        with self.writes(name):
            self.fs.makedirs(self.path(name), exist_ok=True)
            if self.is_local and not os.access(self.path(name), os.W_OK):
                raise PermissionError(self.path(name))

    def remove(self, name: str) -> None:
        """Delete a file if it is there. Raises UserError."""
        if self.exists(name):
            with self.writes(name):
                self.fs.rm_file(self.path(name))

    def remove_folder(self, name: str = "") -> None:
        """Delete a folder of this one, or this one, with all that is in it. Raises UserError."""
        if self.exists(name):
            with self.writes(name):
                self.fs.rm(self.path(name), recursive=True)

    def remove_temporaries(self, folder: str) -> int:
        """Delete what a killed writer left half written; how many files that were."""
        names = [name for name in self.sizes(folder) if name.endswith(TEMPORARY_SUFFIX)]
        for name in names:
            self.fs.rm_file(self.path(posixpath.join(folder, name)))
        return len(names)


def check_regular(path: str) -> None:
    """Raises NotAFileError for a pipe, a socket or a device, without opening it, and OSError."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if kind != stat.S_IFREG:
        raise NotAFileError(f"{IRREGULAR.get(kind, 'no regular file')}; only files are read")


def write_locally(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own for each attempt: two writers of one shard must not share a temporary file
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
def explained(location: str) -> Iterator[None]:
    """Turn what a disk refuses into one line that says what to do."""
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
