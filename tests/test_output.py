"""Test readers of the output that leave: `| head`, `>&-`, a closed terminal, a full disk."""

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

import train.trainer
from schemas import UserError
from schemas.cli import LastingStream, lasting_output, run
from tests.test_version1 import config
from tests.train.runs import metrics


@pytest.fixture
def broken() -> Callable[[], io.TextIOWrapper]:
    """Return a function that makes streams whose reader has left."""
    streams = []

    def make() -> io.TextIOWrapper:
        reading, writing = os.pipe()
        os.close(reading)
        streams.append(os.fdopen(writing, "w", buffering=1))
        return streams[-1]

    yield make
    for stream in streams:
        LastingStream(stream).flush()
        stream.close()


class Full(io.StringIO):
    """A stream whose writes all fail, as to a full disk (ENOSPC) or a closed terminal (EIO)."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_lasting_stream_says_once_that_it_is_closed(broken):
    other = io.StringIO()
    stream = LastingStream(broken(), other)
    for _ in range(3):
        assert stream.write("a line\n") == 7
        stream.flush()
    assert other.getvalue() == "the output is closed (Broken pipe); the command continues\n"
    assert not stream.isatty()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_any_failure_to_write_is_borne(number):
    other = io.StringIO()
    print("text", file=LastingStream(Full(number), other))
    assert os.strerror(number) in other.getvalue()


def test_both_may_be_closed(broken, monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken())
    monkeypatch.setattr(sys, "stderr", broken())
    before = sys.stdout
    with lasting_output():
        print("out")
        print("err", file=sys.stderr)
        for _ in tqdm(range(3)):
            tqdm.write("above the bar")
    assert sys.stdout is before


def test_streams_that_were_never_open(monkeypatch):
    """Use None for both, as Python does after `>&- 2>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_output():
        assert sys.stderr.isatty() is False
        print("out", file=sys.stdout)


def status(main, **options) -> int:
    with pytest.raises(SystemExit) as stop:
        run(main, **options)
    return stop.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "interrupted\n"),
        ({"resumes": True}, "interrupted; run the same command again to resume\n"),
    ],
)
def test_only_a_command_that_resumes_says_so(options, message, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    assert status(main, **options) == 130
    assert capsys.readouterr().err == message


def test_a_job_goes_on_and_a_question_ends(broken, monkeypatch):
    done = []

    def main() -> None:
        for line in range(3):
            print("line", line)
            done.append(line)

    monkeypatch.setattr(sys, "stdout", broken())
    assert status(main, outlives_reader=True) is None
    assert done == [0, 1, 2]
    monkeypatch.setattr(sys, "stdout", broken())
    assert status(main) == 141
    assert done == [0, 1, 2]


def test_what_is_in_the_buffer_at_the_end_is_no_traceback(monkeypatch):
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", buffering=4096)
    monkeypatch.setattr(sys, "stdout", stream)

    def main() -> None:
        print("one line")
        os.close(reading)

    assert status(main) == 141
    stream.close()  # as Python does at exit: must not raise


def test_a_mistake_is_exit_status_2_though_nobody_reads_it(broken, monkeypatch):
    def main() -> None:
        raise UserError("a mistake")

    monkeypatch.setattr(sys, "stderr", broken())
    assert status(main, outlives_reader=True) == 2
    monkeypatch.setattr(sys, "stderr", broken())
    assert status(main) == 2


def test_a_training_ends_with_its_checkpoints(broken, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(sys, "stdout", broken())
    given = config(tmp_path, checkpoint_steps=1)
    assert status(lambda: train.trainer.train(given) and None, outlives_reader=True) is None
    assert (tmp_path / "encoder.safetensors").exists()
    assert (tmp_path / "checkpoints" / "step-00000006").is_dir()
    assert len(metrics(tmp_path)) == 6
