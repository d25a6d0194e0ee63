"""Test which lines on file descriptor 2 count as decoder messages: samples of both kinds."""

import subprocess
import sys
from pathlib import Path

import pytest

from schemas.decoder_noise import NOISE, without_decoder_noise

ROOT = Path(__file__).resolve().parents[1]
PRINTED = [
    b'TIFFReadDirectory: Warning, Bogus "StripByteCounts" field, ignoring and calculating.',
    b"TIFFFillStrip: Read error at scanline 42; got 71 bytes, expected 4224.",
    b"photo.tif: Warning, unknown tag 0xfde8",
    b"\x1b[0;31m[ERROR] \x1b[0m[libtiff_decoder] Could not decode tiff code stream",
    b"\x1b[0;31m[ERROR] \x1b[0m[tiff_parser] Failed to read IFD at offset 16754",
    b"\x1b[0;33m[WARNING] \x1b[0m[libjpeg_turbo_decoder] Premature end of JPEG data.",
    b"[ WARN:0@0.034] global grfmt_tiff.cpp:122 TIFF_Warning TIFFReadDirectory: Unknown field",
    b"[ERROR:0@0.041] global loadsave.cpp:1409 imdecode_ imdecode_(''): can't read data",
    b"[libtiff] unknown field with tag 42113",
    b"[WARN] unsupported marker",
    b"libpng warning: iCCP: known incorrect sRGB profile",
    b"libpng error: IDAT: incorrect data check",
    b"Bogus Huffman table definition",
    b"Corrupt JPEG data: 3 extraneous bytes before marker 0xd9",
    b"Premature end of JPEG file",
]
OTHER = [
    b"error: photos: no images in it",
    b"step 10/60, epoch 1/2, loss 5.0102, 4.6 images/s",
    b"[rank0]: Traceback (most recent call last):",
    b"[W1125 20:00:00 ProcessGroupNCCL.cpp:12] Warning: process group has NOT been destroyed",
    b"[ERROR] the encoding of the config is unknown",
    b"terminate called after throwing an instance of 'std::bad_alloc'",
    b"Fatal Python error: Segmentation fault",
    b"UserWarning: something of Python",
    b"NCCL WARN Call to connect returned Connection refused",
    b"",
]


@pytest.mark.parametrize("line", PRINTED)
def test_lines_of_decoders(line):
    assert NOISE.match(line)


@pytest.mark.parametrize("line", OTHER)
def test_other_lines(line):
    assert not NOISE.match(line)


def test_noise_is_counted_and_all_else_arrives_even_the_last_words(tmp_path):
    (tmp_path / "lines").write_bytes(b"\n".join([*PRINTED, b"", *OTHER, b""]))
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from schemas.decoder_noise import without_decoder_noise
with without_decoder_noise():
    os.write(2, open("lines", "rb").read())
    print("a line of Python", file=sys.stderr)
print("behind it", file=sys.stderr)
with without_decoder_noise():
    os.write(2, b"libpng error: again\\nlast words")
    os.abort()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=tmp_path, timeout=60, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode < 0
    for line in OTHER[:-1]:
        assert lines.count(line) == 1
    assert not set(lines) & set(PRINTED)
    summary = b"image decoders printed %d lines, the first: %s" % (len(PRINTED), PRINTED[0])
    assert lines.index(summary) < lines.index(b"behind it")
    assert b"a line of Python" in lines
    assert lines[-1] == b"last words"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"half a line", b"half a line"),
        (b"libpng error: half a line", b"image decoders printed 1 lines, the first: {}\n"),
        (b"libpng error: x\nhalf", b"half\nimage decoders printed 1 lines, the first: {}\n"),
    ],
)
def test_a_line_that_is_not_ended_is_told_once(written, expected):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from schemas.decoder_noise import without_decoder_noise
with without_decoder_noise():
    os.write(2, {written!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    assert done.stderr == expected.replace(b"{}", written.splitlines()[0])


def test_a_stderr_that_is_no_descriptor_2_stays(capsys):
    stream = sys.stderr
    with without_decoder_noise():
        assert sys.stderr is stream
