"""Keep what image decoders print on stderr from standing between the lines of a job.

libtiff, libjpeg, libpng, OpenCV and nvImageCodec write to file descriptor 2, mostly without a
switch for it. What matters of it comes back as an error or a reject; here the lines are counted,
and the first is shown at the end. A process of its own reads them (this file, run as a program), so
that whatever else is written, the last words of a crash too, still reaches stderr.
"""

import contextlib
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator

NOISE = re.compile(
    rb"(\x1b\[[0-9;]*m)*\[ ?(DEBUG|INFO|WARN|WARNING|ERROR|FATAL)\b[^\]]*\].*"
    rb"(decoder|encoder|parser|libtiff|libjpeg|libpng|libwebp|nvjpeg|nvtiff|imgcodec|grfmt|imdecode)"
    rb"|\[(libtiff|libjpeg|libpng|libwebp|WARN)\]"
    rb"|TIFF\w+: |[\w./ -]+: Warning, |libpng (warning|error): "
    rb"|(Bogus|Corrupt JPEG|Premature end of JPEG|Invalid (JPEG|SOS)|Unsupported (JPEG|marker)"
    rb"|Inconsistent progression|Warning: unknown JFIF)"
)
ASK = b"\0saliency-shards: how many?\n"
ANSWER_SECONDS = 2.0
SHOWN = 160


@contextlib.contextmanager
def without_decoder_noise() -> Iterator[None]:
    """Filter file descriptor 2 within the block; Python's own stderr goes past the filter.

    Does nothing where Python's stderr is another stream than descriptor 2.
    """
    try:
        filtered = sys.stderr is not None and sys.stderr.fileno() == 2
    except (OSError, ValueError):
        filtered = False
    if not filtered:
        yield
        return
    before, kept = sys.stderr, os.dup(2)
    before.flush()
    # a session of its own: Ctrl-C is for the job
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    own = os.fdopen(kept, "w", buffering=1, errors="backslashreplace")
    sys.stderr = own
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was killed
            os.write(2, ASK)
            # not until it ends: processes that live longer than the job may write there still
            select.select([reader.stdout], [], [], ANSWER_SECONDS)
        own.flush()
        os.dup2(kept, 2)
        reader.stdout.close()
        sys.stderr = before
        own.close()


def pass_on() -> None:
    """Copy stdin to stderr without what matches NOISE; say how much that was when asked."""
    count, first, blank_goes = 0, b"", False
    for line in sys.stdin.buffer:
        told = b""
        if line == ASK:
            if count:
                told = b"image decoders printed %d lines, the first: %s\n" % (count, first)
            count = 0
        elif NOISE.match(line):
            first = first if count else line.strip()[:SHOWN]
            count, blank_goes = count + 1, True
            continue
        elif line.strip() or not blank_goes:
            told = line
        blank_goes = False
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(told)
            sys.stderr.buffer.flush()
            if line == ASK:
                os.write(1, b"\n")


if __name__ == "__main__":
    pass_on()
