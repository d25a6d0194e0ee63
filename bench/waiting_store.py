"""An in-memory object store with latency: `waiting://bucket/name`, for fsspec.

Importing this module registers the protocol.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class WaitingFileSystem(MemoryFileSystem):
    """Answer each request after `seconds`, and count the requests.

    Reading a range takes one request, and so does listing a folder, as in S3 (whose pages of 1,000
    names are not imitated).

    Attributes:
        seconds: time until a request is answered.
        requests: number of requests by their kind.
        most_at_once: largest number of requests that were in progress at the same time.
    """

    protocol = "waiting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    seconds: ClassVar[float] = 0.0
    requests: ClassVar[Counter[str]] = Counter()
    most_at_once: ClassVar[int] = 0
    at_once: ClassVar[int] = 0
    lock: ClassVar[Any] = threading.Lock()

    @classmethod
    def reset(cls, seconds: float) -> None:
        """Delete all files and counts, and set the latency."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.requests.clear()
        cls.seconds, cls.most_at_once = seconds, 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        inner = str(path).removeprefix("waiting://").strip("/")
        return f"/{inner}" if inner else ""

    @contextmanager
    def request(self, kind: str) -> Iterator[None]:
        cls = WaitingFileSystem
        with cls.lock:
            cls.requests[kind] += 1
            cls.at_once += 1
            cls.most_at_once = max(cls.most_at_once, cls.at_once)
        try:
            time.sleep(cls.seconds)
            yield
        finally:
            with cls.lock:
                cls.at_once -= 1

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        with self.request("read"):
            return self.content(path)[slice(start, end)]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self.request("write"):
            super().pipe_file(path, value, mode, **options)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **options: Any) -> None:
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def ls(self, path: str, detail: bool = True, **options: Any) -> list:
        with self.request("list"):
            return super().ls(path, detail, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        with self.request("list"):
            return super().find(path, *arguments, **options)

    def info(self, path: str, **options: Any) -> dict:
        with self.request("head"):
            return super().info(path, **options)

    def content(self, path: str) -> bytes:
        name = self._strip_protocol(path)
        if name not in self.store:
            raise FileNotFoundError(path)
        return self.store[name].getbuffer().tobytes()


def put(name: str, content: bytes) -> None:
    """Put a file into the store without waiting."""
    MemoryFileSystem.pipe_file(fsspec.filesystem("waiting"), f"/{name}", content)


fsspec.register_implementation("waiting", WaitingFileSystem, clobber=True)
