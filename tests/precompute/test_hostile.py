"""Tests of hostile inputs: each is written or rejected with a reason; none ends the job or is lost.

Not files: a named pipe, a link to one, a socket, a link to a device, a dangling link, a link to
itself, a folder with an image's name. Names: in Latin-1, with a line break, with quotes and
backslashes, of 255 bytes, with emoji, in two cases, with three extensions, without an extension,
with dots and blanks at both ends, names that look like a URL or like a glob. Content that is no
image: nothing, zeros, text, HTML, a ZIP archive, PDF, SVG, Thumbs.db. Unsupported formats: HEIC,
JPEG XL as a codestream and in a container, a 12-bit JPEG, a lossless JPEG, a video. Damage: a cut
PNG, a cut JPEG, a damaged AVIF, a PNG of 30,000 x 30,000 pixels, a PNG of width 0, bytes before a
JPEG, a TIFF whose tags point nowhere. Valid but unusual: bytes after a JPEG, a cut EXIF segment,
an orientation of 99, a broken color profile, a lossless WebP with EXIF, an animated GIF, an
animated PNG, an MPO, a TIFF of two pages, an icon of several sizes, one pixel, a line of 500 x 1
and of 1 x 9000 pixels, QOI, BMP of 1 bit, JPEG 2000 with alpha.
"""

import io
import os
import socket
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import MaskedViews
from precompute.formats import name_format
from precompute.reencode import Resize
from precompute.sources.trees import Folder
from schemas import ShardDataset
from schemas.names import from_stored, to_stored
from schemas.storage import NotAFileError, Store
from tests.conftest import encode, noise
from tests.precompute.conftest import build_folder

IMAGE = Image.fromarray(noise(0, 40, 56))
LATIN = os.fsdecode(b"caf\xe9.jpg")


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


JPEG, PNG = saved(IMAGE, "JPEG"), saved(IMAGE, "PNG")


def exif(content: bytes) -> bytes:
    """Return the JPEG with an EXIF segment of this content."""
    segment = b"Exif\0\0" + content
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + JPEG[2:]


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header claims this size."""
    png = bytearray(PNG)
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    return bytes(png)


def frame(marker: int, bits: int) -> bytes:
    """Return a JPEG whose frame header has this marker and number of bits."""
    jpeg = bytearray(JPEG)
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 1], jpeg[place + 4] = marker, bits
    return bytes(jpeg)


def orientation(value: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = value
    return saved(IMAGE, "WEBP", lossless=True, exif=tags)


WRITTEN = {
    LATIN: JPEG,
    "line\nbreak.jpg": JPEG,
    "quote'\"$\\x41.jpg": JPEG,
    "x" * 251 + ".jpg": JPEG,
    "🐈\u0301.jpg": JPEG,
    "case.jpg": JPEG,
    "CASE.jpg": PNG,
    "ending.jpg": JPEG,
    "ending.png": PNG,
    "ending.JPG": JPEG,
    "no ending": JPEG,
    " .. .jpg": JPEG,
    "s3:bucket.jpg": JPEG,
    "[a-z]*?.jpg": JPEG,
    "behind.jpg": JPEG + b"garbage" * 99,
    "exif-cut.jpg": exif(b"MM\0*\0\0\0\x08\0\x09\x01\x12"),
    "exif-99.jpg": exif(b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0"),
    "profile.png": saved(IMAGE, "PNG", icc_profile=b"no profile"),
    "lossless.webp": orientation(6),
    "moving.gif": saved(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)]),
    "moving.png": saved(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(90)]),
    "stereo.mpo": saved(IMAGE, "MPO", save_all=True, append_images=[IMAGE]),
    "pages.tiff": saved(IMAGE, "TIFF", save_all=True, append_images=[IMAGE]),
    "icon.ico": saved(IMAGE, "ICO", sizes=[(16, 16), (32, 32)]),
    "pixel.png": saved(IMAGE.resize((1, 1)), "PNG"),
    "line.png": saved(IMAGE.resize((500, 1)), "PNG"),
    "column.png": saved(IMAGE.resize((1, 9000)), "PNG"),
    "some.qoi": saved(IMAGE, "QOI"),
    "bits.bmp": saved(IMAGE.convert("1"), "BMP"),
    "alpha.jp2": saved(IMAGE.convert("LA"), "JPEG2000"),
}
REJECTED = {
    # content, expected reason, and a part of the expected detail
    "empty.jpg": (b"", "empty", ""),
    "zeros.jpg": (bytes(9000), "not-an-image", ""),
    "text.jpg": (b"a line of text\n" * 99, "not-an-image", ""),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "not-an-image", ""),
    "page.jpg": (b"<!DOCTYPE html><html>404", "undecodable", "an HTML page"),
    "zip.jpg": (b"PK\x03\x04" + bytes(90), "undecodable", "ZIP"),
    "paper.jpg": (b"%PDF-1.7\n" + bytes(90), "undecodable", "PDF"),
    "drawing.svg": (b'<?xml version="1.0"?><svg/>', "undecodable", "SVG"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "undecodable", "HEIC"),
    "code.jxl": (b"\xff\x0a\xfa\x1f" + bytes(90), "undecodable", "JPEG XL"),
    "box.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90), "undecodable", "JPEG XL"),
    "twelve.jpg": (frame(0xC1, 12), "undecodable", "12-bit JPEG"),
    "lossless.jpg": (frame(0xC3, 8), "undecodable", ""),
    "video.jpg": (b"\0\0\0\x18ftypisom" + bytes(90), "undecodable", "video"),
    "cut.png": (PNG[: len(PNG) // 2], "undecodable", ""),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "undecodable", ""),
    "damaged.avif": (saved(IMAGE, "AVIF")[:-200], "undecodable", ""),
    "bomb.png": (png_of(30000, 30000), "too-large", ""),
    "no-width.png": (png_of(0, 9), "not-an-image", ""),
    "before.jpg": (b"\xef\xbb\xbf" + JPEG, "not-an-image", ""),
    "tags.tiff": (b"II*\0\x08\0\0\0\xff\xff" + bytes(40), "not-an-image", ""),
}
IRREGULAR = {
    "pipe.jpg": "not-a-file",
    "to-pipe.jpg": "not-a-file",
    "socket.jpg": "not-a-file",
    "zero.jpg": "not-a-file",
    "dangling.jpg": "unreadable",
    "itself.jpg": "unreadable",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "root"
    folder = root / "a"
    folder.mkdir(parents=True)
    for name, content in WRITTEN.items():
        (folder / name).write_bytes(content)
    for name, (content, _, _) in REJECTED.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "to-pipe.jpg").symlink_to("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        server.bind("socket.jpg")
        os.chdir(here)
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "dangling.jpg").symlink_to("nowhere")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "1.jpg").write_bytes(JPEG)
    for name in (".DS_Store", "._1.jpg"):
        (folder / name).write_bytes(b"Mac OS X")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "1.jpg").write_bytes(b"Mac OS X")
    return root


@pytest.mark.parametrize("resize", [Resize(), Resize(30)], ids=["kept", "resized"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow, about damaged tags
def test_each_is_written_or_rejected_with_a_reason(
    root: Path, tmp_path: Path, resize: Resize
) -> None:
    dataset = build_folder(root, tmp_path / "out", resize=resize)
    assert dataset.classes == ["a"]
    rejects = {row["source"]: row for row in dataset.rejects.to_pylist()}
    written = {from_stored(source) for source in dataset.samples["source"].to_pylist()}
    assert written == {f"a/{name}" for name in [*WRITTEN, "folder.jpg/1.jpg"]}
    reasons = {name: row["reason"] for name, row in rejects.items()}
    expected = {name: reason for name, (_, reason, _) in REJECTED.items()} | IRREGULAR
    assert reasons == {f"a/{name}": reason for name, reason in expected.items()}
    for name, (_, _, word) in REJECTED.items():
        assert word in rejects[f"a/{name}"]["detail"]
    assert all((root / source).exists() for source in written)
    views = MaskedViews(str(tmp_path / "out"), "none", batch_size=1, device="cpu", report=["keys"])
    assert len({key for batch in views for key in batch.sample_keys}) == len(written)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_reencoded_says_so(root: Path, tmp_path: Path) -> None:
    dataset = build_folder(root, tmp_path / "out")
    rows = {row["source"]: row["reencoded"] for row in dataset.samples.to_pylist()}
    again = {name.removeprefix("a/") for name, reencoded in rows.items() if reencoded}
    assert again == {"lossless.webp", "moving.gif", "icon.ico", "some.qoi", "alpha.jp2"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_name_that_is_no_utf8_is_found_again(root: Path, tmp_path: Path) -> None:
    dataset = build_folder(root, tmp_path / "out")
    stored = next(s for s in dataset.samples["source"].to_pylist() if "caf" in s)
    assert stored == r"$'a/caf\xe9.jpg'"
    assert from_stored(stored) == f"a/{LATIN}"
    shell = ["bash", "-c", f"cat {stored}"]  # stored names are quoted for a shell
    assert subprocess.run(shell, cwd=root, capture_output=True, check=True).stdout == JPEG


@pytest.mark.parametrize(
    "location",
    [
        "a/b.jpg",
        "a/ü\U0001f408.jpg",
        os.fsdecode(b"a/\xff\xfe.jpg"),
        os.fsdecode(b"it's\\x41\xe9.jpg"),
        "$'quoted'",
        "$'",
        r"caf\xe9.jpg",
        os.fsdecode(b"caf\xe9\\\\'.jpg"),
    ],
)
def test_stored_names_are_utf8_and_tell_locations_apart(location: str) -> None:
    stored = to_stored(location)
    stored.encode()
    assert from_stored(stored) == location
    assert (stored == location) == (not stored.startswith("$'"))


def test_names_and_classes_that_are_no_utf8_are_kept_apart(tmp_path: Path) -> None:
    classes = [os.fsdecode(b"h\xfcnd"), r"h\xfcnd", "hünd"]
    for number, name in enumerate(classes):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "1.jpg").write_bytes(encode(noise(number)))
    dataset = build_folder(tmp_path / "root", tmp_path / "out")
    assert {from_stored(name) for name in dataset.classes} == set(classes)
    assert len(dataset) == 3
    for row in ShardDataset.open(tmp_path / "out").samples.to_pylist():
        folder, _ = from_stored(row["source"]).split("/")
        assert from_stored(dataset.classes[row["label"]]) == folder


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
def test_what_is_no_file_is_never_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "a device":
        path.symlink_to("/dev/null")
    else:
        os.mkfifo(path)
    for read in (Store(tmp_path).read, Store(tmp_path).open):
        with pytest.raises(NotAFileError, match=kind):
            read("x")


def test_pipes_beside_the_classes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert [entry.reason for entry in Folder(str(tmp_path), "", False).images()] == ["no-class"]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypmif1\0\0\0\0", "HEIF"),
        (b"\0\0\0\x18ftypcrx ", "Canon raw (CR3)"),
        (frame(0xF7, 8), "JPEG-LS"),
        (frame(0xC3, 16), "16-bit lossless JPEG"),
        (frame(0xC0, 8), ""),
        (b"\xff\xd8\xff", ""),
        (b"\xff\xd8\xff\xe1\xff\xff", ""),
        (b"", ""),
        (np.random.default_rng(0).bytes(999), ""),
    ],
)
def test_formats_are_named_by_their_bytes(content: bytes, name: str) -> None:
    assert name_format(content) == name
