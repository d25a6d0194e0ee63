"""Test the reading of tars of which no header can be trusted."""

import tarfile

import pytest

from schemas import FormatError
from schemas.shard import list_members


def test_a_negative_size_is_a_damaged_header() -> None:
    """GNU tar stores large sizes in base 256, which may be negative; listing went on forever."""
    header = bytearray(tarfile.TarInfo("key.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = tarfile.itn(-tarfile.BLOCKSIZE, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar = bytes(header) + bytes(tarfile.RECORDSIZE - len(header))
    with pytest.raises(FormatError, match="damaged header at byte 0, after the start"):
        next(list_members(tar))
