"""Run a function in a thread for the duration of a block."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def run_beside(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Call `function(*arguments, over)` in a thread; at its end the block sets `over` and waits."""
    over = threading.Event()
    thread = threading.Thread(target=function, args=(*arguments, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
