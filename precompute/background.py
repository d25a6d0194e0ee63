"""Run a function in a background thread for the duration of a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def run_in_background(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Run `function(*arguments, stop)` in a thread.

    Leaving the block sets the event `stop` and joins the thread.
    """
    stop = threading.Event()
    thread = threading.Thread(target=function, args=(*arguments, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
