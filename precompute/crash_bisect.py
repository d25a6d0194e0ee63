"""Find images that kill the process that reads them, by bisection in a child process.

A decoder that crashes, or an image that uses up all memory, cannot be caught as an exception. After
a shard has killed its worker repeatedly, a child process makes its samples without writing them. A
list of images that kills the child is halved until single images are left.
"""

# The child imports this file first, so torch, DALI and Ray are imported only where they are used.
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from precompute.sources.base import SourceImage
from schemas.errors import UserError

if TYPE_CHECKING:
    from precompute.shard_builder import ShardBuilder


class CrashProbe:
    """A child process that makes samples of images; it is restarted after a crash.

    Attributes:
        cause: the name of the signal, or the exit code, of the last crash.
    """

    def __init__(self, make_builder: "Callable[[], ShardBuilder]"):
        from ray import cloudpickle  # unlike pickle, can send classes by value, as Ray does

        self.make_builder = cloudpickle.dumps(make_builder)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self.cause = ""

    def survives(self, images: Sequence[SourceImage]) -> bool:
        """Return whether the child survives all of these images.

        Raises:
            UserError: the child survives but meets an exception. The images after it were not
                tried, so the search cannot continue. Or a new child dies before it has read any
                image, for example because memory is too small for its network.
        """
        if self.process is None:
            self.process, self.connection = self.start()
            if not self.answers([]):
                raise UserError(
                    "the search for an image that kills its worker failed: a process died before "
                    f"it read any image ({self.cause}); no image is rejected for it"
                )
        return self.answers(images)

    def answers(self, images: Sequence[SourceImage]) -> bool:
        """Send images to the child; return False if it dies. Raises UserError as `survives`."""
        assert self.process is not None
        assert self.connection is not None
        try:
            self.connection.send([tuple(image) for image in images])
            error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            self.cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.close()
            return False
        if error is not None:
            raise UserError(f"the search for an image that kills its worker failed: {error}")
        return True

    def start(self) -> tuple[multiprocessing.process.BaseProcess, Connection]:
        # Spawned, not forked: DALI initializes CUDA when it is imported, and a fork of a process
        # that has done so cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        connection, child_end = context.Pipe()
        process = context.Process(
            target=serve_probe, args=(child_end, self.make_builder), daemon=True
        )
        process.start()
        child_end.close()
        return process, connection

    def close(self) -> None:
        if self.process is not None and self.connection is not None:
            self.connection.close()
            self.process.terminate()
            self.process.join()
        self.process = self.connection = None


def serve_probe(connection: Connection, make_builder: bytes) -> None:
    """Run the child: make the samples of each list received, reply with the error, or None.

    Returns when the other side closes the connection.
    """
    builder: ShardBuilder | None = None
    while True:
        try:
            images = [SourceImage(*image) for image in connection.recv()]
        except EOFError:
            return
        try:
            builder = builder or pickle.loads(make_builder)()
            for _ in builder.make(images, {}):
                pass
        except UserError as error:
            connection.send(str(error))
        except Exception as error:
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")
        else:
            connection.send(None)


def find_crashing_images(
    images: Sequence[SourceImage], make_builder: "Callable[[], ShardBuilder]"
) -> dict[str, str]:
    """Return the images that crash a process on their own: the cause by key.

    Returns:
        an empty dictionary if no single image does.

    Raises:
        UserError: the samples could not be made for another reason.
    """
    probe = CrashProbe(make_builder)
    crashing: dict[str, str] = {}

    def search(part: Sequence[SourceImage]) -> None:
        if probe.survives(part):
            return
        if len(part) == 1:
            crashing[part[0].key] = f"the process that read it died ({probe.cause})"
            return
        search(part[: len(part) // 2])
        search(part[len(part) // 2 :])

    try:
        search(images)
    finally:
        probe.close()
    return crashing
