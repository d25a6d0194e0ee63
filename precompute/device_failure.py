"""Errors of a GPU or of memory in a worker: one line with the reason and what to do."""

from schemas.device_errors import classify_error, first_line
from schemas.errors import UserError


def device_error(error: RuntimeError, what: str) -> UserError:
    """Return a UserError that ends the job.

    Args:
        error: an error of DALI's or PyTorch's.
        what: what failed, the begin of the line.
    """
    reason = first_line(str(error))
    if classify_error(str(error)) == "memory":
        return UserError(
            f"{what}, out of memory ({reason}); no image is rejected for it: fewer workers at a "
            "time need less (--gpus-per-worker 1, a smaller --workers)"
        )
    return UserError(
        f"{what} ({reason}); no image is rejected for it: look at `nvidia-smi` and the system's log"
    )
