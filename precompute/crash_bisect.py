"""Which inputs kill the process that reads them: found by halving, in a process that may die.

A decoder that crashes or an image that needs all memory cannot be caught as an exception. What
kills a whole shard's worker again and again is looked for here: the images are made, but not
written, by a child process; a list that kills it is halved until single images are left.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from ray import cloudpickle

from precompute.shard_builder import ShardBuilder
from precompute.sources import SourceImage

MakeBuilder = Callable[[], ShardBuilder]


class CrashProbe:
    """A child process that makes images; it is started again when one has killed it.

    Attributes:
        died_of: the name of the signal, or the exit code, of the last death.
    """

    def __init__(self, make_builder: MakeBuilder):
        # by value where Ray has given us classes by value
        self.make_builder = cloudpickle.dumps(make_builder)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self.died_of = ""

    def survives(self, images: Sequence[SourceImage]) -> bool:
        """Whether the child lives through all of them."""
        if self.process is None or self.connection is None:
            # forked from a process that has imported torch and DALI once, and used neither
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["precompute.shard_builder"])
            self.connection, theirs = context.Pipe()
            self.process = context.Process(
                target=serve_probe, args=(theirs, self.make_builder), daemon=True
            )
            self.process.start()
            theirs.close()
        try:
            self.connection.send([tuple(image) for image in images])
            self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            self.died_of = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.close()
            return False
        return True

    def close(self) -> None:
        if self.process is not None and self.connection is not None:
            self.connection.close()
            self.process.terminate()
            self.process.join()
        self.process = self.connection = None


def serve_probe(connection: Connection, make_builder: bytes) -> None:
    """In the child: make each list of images, and say so. An exception is none of our business."""
    builder = cloudpickle.loads(make_builder)()
    with contextlib.suppress(EOFError):
        while True:
            images = [SourceImage(*image) for image in connection.recv()]
            with contextlib.suppress(Exception):  # the worker will meet it too, and report it
                for _ in builder.make(images, {}):
                    pass
            connection.send("alive")


def find_crashing_images(
    images: Sequence[SourceImage], make_builder: MakeBuilder
) -> dict[str, str]:
    """Keys of the images that kill a process alone, and how it died. Empty if none does alone."""
    probe = CrashProbe(make_builder)
    found: dict[str, str] = {}

    def search(part: Sequence[SourceImage]) -> None:
        if probe.survives(part):
            return
        if len(part) == 1:
            found[part[0].key] = f"the process that read it died ({probe.died_of})"
            return
        search(part[: len(part) // 2])
        search(part[len(part) // 2 :])

    try:
        search(images)
    finally:
        probe.close()
    return found
