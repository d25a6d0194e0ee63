"""Ray for the length of a job: a running cluster, or a local one that ends with it."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from types import FrameType

import ray
import ray.data

from schemas.cli import TerminatedError
from schemas.errors import UserError


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to Ray. SIGTERM ends the block by `TerminatedError`. Raises UserError."""
    # Ray reports at length on itself; what concerns the job comes back in rows
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for logger in ("ray", "ray.data"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        ray.shutdown()


def terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError
