"""Report GPU and out-of-memory errors of a worker in one line, with the reason and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from schemas.device_errors import classify_error, first_line
from schemas.errors import UserError


def classify(error: Exception) -> Literal["memory", "device", "data"]:
    """Classify an error raised by DALI or PyTorch; see `classify_error`."""
    return "memory" if isinstance(error, MemoryError) else classify_error(str(error))


@contextmanager
def translate_device_errors(what: str) -> Iterator[None]:
    """Raise UserError in place of a GPU or out-of-memory error; other errors pass unchanged.

    Args:
        what: what failed, the beginning of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if classify(error) == "data":
            raise
        raise build_device_error(error, what) from error


def build_device_error(error: Exception, what: str) -> UserError:
    """Return the UserError that ends the job.

    Args:
        error: an error raised by DALI or PyTorch.
        what: what failed, the beginning of the message.
    """
    reason = first_line(str(error) or type(error).__name__)
    if classify(error) == "memory":
        return UserError(
            f"{what}, out of memory ({reason}); no image is rejected for it: fewer workers at a "
            "time need less (--gpus-per-worker 1, a smaller --workers)"
        )
    return UserError(
        f"{what} ({reason}); no image is rejected for it: look at `nvidia-smi` and the system's log"
    )
