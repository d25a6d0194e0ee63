"""Errors of a GPU or of memory in a worker: one line with the reason and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from schemas.device_errors import classify_error, first_line
from schemas.errors import UserError


def classify(error: Exception) -> Literal["memory", "device", "data"]:
    """Return what an error of DALI's or PyTorch's is about: see `classify_error`."""
    return "memory" if isinstance(error, MemoryError) else classify_error(str(error))


@contextmanager
def device_errors_named(what: str) -> Iterator[None]:
    """Raise UserError in place of an error of a GPU or of memory; others stay as they are.

    Args:
        what: what failed, the begin of the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if classify(error) == "data":
            raise
        raise device_error(error, what) from error


def device_error(error: Exception, what: str) -> UserError:
    """Return a UserError that ends the job.

    Args:
        error: an error of DALI's or PyTorch's.
        what: what failed, the begin of the line.
    """
    reason = first_line(str(error))
    if classify(error) == "memory":
        return UserError(
            f"{what}, out of memory ({reason}); no image is rejected for it: fewer workers at a "
            "time need less (--gpus-per-worker 1, a smaller --workers)"
        )
    return UserError(
        f"{what} ({reason}); no image is rejected for it: look at `nvidia-smi` and the system's log"
    )
