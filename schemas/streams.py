"""Stream the files of a store: read byte ranges, write in pieces that become visible as a whole."""

import io
import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from schemas.storage import Store


class RangeReader(io.RawIOBase):
    """A file of a store, of which only the requested ranges are read.

    Every `read` is one request to the store. Arrow reads a column of a row group with one `read`.

    Args:
        size: size of the file in bytes; by default the store is asked for it.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be read; also from every method.
    """

    def __init__(self, store: "Store", name: str, size: int | None = None):
        super().__init__()
        self.store, self.name = store, name
        with store.translate_read_errors(name):
            self.size = store.size(name) if size is None else size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.position + size, self.size)
        if end <= self.position:
            return b""
        content = self.fetch(self.position, end)
        self.position += len(content)
        return content

    def fetch(self, start: int, end: int) -> bytes:
        with self.store.translate_read_errors(self.name):
            return self.store.read(self.name, start, end)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class StoreWriter(io.RawIOBase):
    """A new file of a store, written piece by piece; readers see all of it or nothing.

    The file appears when the `with` block ends, and does not appear if the block raises. On a local
    disk it is written under a temporary name in its folder. For an object store it is written to a
    temporary file on this machine (`TMPDIR`) and then uploaded as one file.

    Raises:
        UserError: no space left, or no permission; from every method.
    """

    def __init__(self, store: "Store", name: str, suffix: str):
        super().__init__()
        self.store, self.name, self.written = store, name, 0
        with store.translate_write_errors(name):
            if store.is_local:
                path = Path(store.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                self.temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{suffix}")
                self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115  closed in __exit__
            else:
                descriptor, temporary = tempfile.mkstemp(suffix)
                self.temporary = Path(temporary)
                self.file = os.fdopen(descriptor, "wb")

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.written

    def write(self, content: Any) -> int:
        with self.store.translate_write_errors(self.name):
            self.file.write(content)
        self.written += len(content)
        return len(content)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self.store.translate_write_errors(self.name):
                    self.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file if it still exists."""
        with suppress(OSError):  # a full disk refuses what is still in the buffer once more
            self.file.close()
        self.temporary.unlink(missing_ok=True)
        self.close()

    def commit(self) -> None:
        """Make the file visible under its name."""
        self.file.flush()
        if self.store.is_local:
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.store.path(self.name))
            sync_folder(self.temporary.parent)
        else:
            self.file.close()
            self.store.fs.put_file(str(self.temporary), self.store.path(self.name))


def sync_folder(folder: Path) -> None:
    """Make renames in a local folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
