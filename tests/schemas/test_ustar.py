"""Test that archives equal those of Python's tarfile, byte for byte."""

import io
import tarfile

import pytest

from schemas.ustar import UstarWriter, make_header

MEMBERS = {
    "a.jpg": b"x" * 511,
    "a.saliency.png": b"y" * 512,
    "a.cls": b"-1",
    "b.jpg": bytes(70_000),
    f"{'k' * 64}.{'e' * 35}": b"",
}


def by_tarfile(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("count", range(len(MEMBERS) + 1))
def test_an_archive_equals_that_of_tarfile(count: int) -> None:
    members = dict(list(MEMBERS.items())[:count])
    writer = UstarWriter()
    offsets = [writer.add(name, content) for name, content in members.items()]
    tar = writer.getvalue()
    assert tar == by_tarfile(members)
    for offset, content in zip(offsets, members.values(), strict=True):
        assert tar[offset : offset + len(content)] == content


@pytest.mark.parametrize("size", [0, 1, 8**7, 8**11 - 1])
def test_a_header_equals_that_of_tarfile_for_any_size(size: int) -> None:
    info = tarfile.TarInfo("key.jpg")
    info.size = size
    assert make_header("key.jpg", size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("k" * 101, 1), ("", 1), ("k", 8**11), ("\xfc", 1)])
def test_what_ustar_cannot_hold_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=r"USTAR|ascii"):
        make_header(name, size)
