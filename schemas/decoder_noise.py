"""Keep the messages that image decoders print on stderr out of a job's output.

libtiff, libjpeg, libpng, OpenCV and nvImageCodec write to file descriptor 2, mostly without an
option to turn it off. Anything important comes back as an error or a reject, so these lines are
only counted here, and the first one is shown at the end. A separate process reads them (this file,
run as a program), so that everything else that is written, even the last message of a crash, still
reaches stderr.
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
ANSWER_SECONDS = 10.0  # a filter that was killed closes its pipe, which ends the wait at once
SHOWN = 160


@contextlib.contextmanager
def without_decoder_noise() -> Iterator[None]:
    """Filter file descriptor 2 within the block; Python's own stderr bypasses the filter.

    Does nothing if Python's stderr is not descriptor 2.
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
    # A separate session keeps Ctrl-C from reaching the filter: it is meant for the job.
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
        with contextlib.suppress(OSError):  # the filter process was killed
            os.write(2, ASK)
            # Wait for the answer, not for the filter to exit: processes that outlive the job may
            # still write to it.
            select.select([reader.stdout], [], [], ANSWER_SECONDS)
        own.flush()
        os.dup2(kept, 2)
        reader.stdout.close()
        sys.stderr = before
        own.close()


def pass_on() -> None:
    """Copy stdin to stderr without the lines that match NOISE; report their number when asked."""
    count, first, blank_goes = 0, b"", False
    for line in sys.stdin.buffer:
        is_report_requested = line.endswith(ASK)
        output = line.removesuffix(ASK)  # the text before it is an unfinished line
        if NOISE.match(output):
            first = first if count else output.strip()[:SHOWN]
            count, blank_goes, output = count + 1, True, b""
        else:
            if blank_goes and not output.strip():
                output = b""
            blank_goes = False
        if is_report_requested and count:
            output += b"\n" if output else b""
            output += b"image decoders printed %d lines, the first: %s\n" % (count, first)
            count = 0
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(output)
            sys.stderr.buffer.flush()
            if is_report_requested:
                os.write(1, b"\n")


if __name__ == "__main__":
    pass_on()
