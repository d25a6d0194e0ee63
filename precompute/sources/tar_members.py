"""List the members of a tar without reading its contents."""

import logging
import tarfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from schemas.storage import Store
from schemas.streams import RangeReader

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes read at a time from a tar in an object store (our choice). At 50 MB/s, this many bytes take
the 20 ms of one more request, so smaller members are read along with their neighbors, and larger
ones are skipped."""
INDEX = "v1.2 "
"""First word of a DALI index whose version includes the names of the members."""


class TarMember(NamedTuple):
    """A member of a tar.

    Attributes:
        name: path in the tar.
        offset: position of the content in the tar, in bytes.
        size: size of the content in bytes.
        kind: kind of a member that is not a regular file; empty for a regular file.
    """

    name: str
    offset: int
    size: int
    kind: str = ""


class BlockReader(RangeReader):
    """File object for an object store that reads blocks, each beginning at a requested position.

    Args:
        size: size of the file in bytes.
    """

    def __init__(self, store: Store, name: str, size: int):
        super().__init__(store, name, size)
        self.start = 0
        self.block = b""
        self.kept: dict[int, bytes] = {}

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.size - self.position, 0)
        size = left if size is None or size < 0 else min(size, left)
        kept = self.kept.get(self.position, b"")
        if 0 < size <= len(kept):
            self.position += size
            return kept[:size]
        begin = self.position - self.start
        if size and not 0 <= begin <= begin + size <= len(self.block):
            end = min(self.position + max(size, BLOCK), self.size)
            self.block = self.fetch(self.position, end)
            self.start, begin = self.position, 0
        content = self.block[begin : begin + size]
        self.position += len(content)
        return content

    def keep(self, offset: int, size: int) -> None:
        """Keep a range in memory that will be read again after the block has moved on."""
        position = self.position
        self.seek(offset)
        self.kept[offset] = self.read(size)
        self.position = position


def list_members_by_headers(
    archive: tarfile.TarFile, file: BinaryIO | BlockReader
) -> Iterator[TarMember]:
    """Yield the members of an open tar by reading its headers.

    Args:
        file: the file of the archive.

    Raises:
        tarfile.TarError: it is no tar, or not a whole one.
    """
    for info in archive:
        if info.isdir():
            continue
        kind = ""
        if not info.isreg() or info.issparse():
            kind = "a link" if info.islnk() or info.issym() else "not a regular file"
        yield TarMember(info.name, info.offset_data, info.size, kind)
    check_end(file, archive.offset)


def check_end(file: BinaryIO | BlockReader, offset: int) -> None:
    """Check that a tar has its end mark at `offset`, and nothing after it.

    tarfile takes a damaged header, and the place where a file was cut between two members, for the
    end of the archive; all samples after it would be lost without notice.

    Raises:
        tarfile.ReadError: there is something else.
    """
    file.seek(offset)
    content = file.read(tarfile.BLOCKSIZE)
    if not content:
        raise tarfile.ReadError(
            f"its end mark, a block of zeros, is missing at byte {offset}, so it may be cut short; "
            "if it is whole, `truncate -s +1024` adds the mark"
        )
    if len(content) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut short inside a header at byte {offset}")
    while content:
        if content.strip(b"\0"):
            raise tarfile.ReadError(
                f"after byte {offset} are no more members, but other content: a header is damaged, "
                "or several tars are joined"
            )
        content = file.read(BLOCK)


def list_members_by_index(text: bytes, file: BlockReader) -> list[TarMember] | None:
    """Return the regular files of a tar from its DALI index, in their order in the tar.

    Returns:
        None for an index of another version, or one that does not match the end of the tar; the
        headers must be read then.
    """
    try:
        first, *lines = text.decode().splitlines()
        members = [member for line in lines for member in parse_index_line(line)]
        if not first.startswith(INDEX) or not members:
            raise ValueError(f"it begins with {first[:20]!r}")
        last = max(members, key=lambda member: member.offset)
        check_header(file, last)
    except (ValueError, tarfile.TarError) as error:
        log.warning("%s: its index is not used: %s", file.name, error)
        return None
    return sorted(members, key=lambda member: member.offset)


def parse_index_line(line: str) -> Iterable[TarMember]:
    """Parse a line of an index: `extension offset size name` per member. Raises ValueError."""
    words = line.split(" ")
    for start in range(0, len(words), 4):
        extension, offset, size, name = words[start : start + 4]
        if not name.endswith(f".{extension}"):
            raise ValueError(f"{name!r} does not end in {extension!r}")
        yield TarMember(name, int(offset), int(size))


def check_header(file: BlockReader, member: TarMember) -> None:
    """Check that a member matches its header in the tar. Raises ValueError, tarfile.TarError."""
    begin = member.offset - tarfile.BLOCKSIZE
    if begin < 0 or member.offset + member.size > file.size:
        raise ValueError(f"{member.name} would lie outside of the {file.size} bytes of the tar")
    file.seek(begin)
    info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    if info.size != member.size or not member.name.endswith(info.name.rpartition("/")[2]):
        raise ValueError(f"the tar has {info.name} of {info.size} bytes where it has {member.name}")
