"""Test the reading of tars of which no header can be trusted."""

import tarfile
from collections.abc import Callable

import pytest

from schemas import FormatError, Sample
from schemas.shard import list_members, pack
from schemas.ustar import UstarWriter


def test_a_negative_size_is_a_damaged_header() -> None:
    """GNU tar stores large sizes in base 256, which may be negative; listing went on forever."""
    header = bytearray(tarfile.TarInfo("key.jpg").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = tarfile.itn(-tarfile.BLOCKSIZE, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar = bytes(header) + bytes(tarfile.RECORDSIZE - len(header))
    with pytest.raises(FormatError, match="damaged header at byte 0, after the start"):
        next(list_members(tar))


def test_a_tar_that_is_cut_anywhere_is_damaged() -> None:
    """A part of its last file and of the blocks of zeros after it may be all that is missing."""
    tar = UstarWriter()
    tar.add("one.jpg", bytes(600))
    tar.add("two.jpg", bytes(range(1, 101)))
    content = tar.getvalue()
    end = 6 * tarfile.BLOCKSIZE  # two headers, 2 + 1 blocks of content, one of zeros
    assert [member.key for member in list_members(content[:end])] == ["one", "two"]
    for length in range(0, end, 50):
        with pytest.raises(FormatError, match=f"cut short .*, at byte {length}$"):
            list(list_members(content[:length]))


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_member_that_is_not_a_plain_file_is_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("key.jpg")
    info.type = kind
    tar = info.tobuf(tarfile.USTAR_FORMAT) + bytes(tarfile.RECORDSIZE)
    with pytest.raises(FormatError, match=r"key\.jpg at byte 0 is not a plain file"):
        list(list_members(tar))


def test_a_key_may_be_in_a_shard_once(make_sample: Callable[..., Sample]) -> None:
    with pytest.raises(ValueError, match="key sample-0001 twice in shard 7"):
        pack(7, [make_sample(1), make_sample(2), make_sample(1)])
