"""A small S3 and HTTP server with a latency, a bandwidth limit and faults on demand.

It serves the files of a local folder, read-only: `GET /bucket/key` is the file `folder/bucket/key`.
It supports what a reader of shards needs (GET with ranges, HEAD, ListObjectsV2) and no signatures.
`GET /?counts` returns the number of requests for each file as JSON.

Benchmarks start it as a separate process, so that its CPU time does not count as the client's:

    python -m bench.object_store FOLDER --latency 0.02 --bandwidth 200e6
"""

import argparse
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PIECE = 1 << 18
"""Bytes sent at a time; in between, other connections get their share of the bandwidth."""

Fault = Callable[[str, int], str | None]
"""A function (path, number of earlier GETs of it) -> None, "500", "503", "403", "cut" (the
connection breaks inside the body), "short" (half the body, declared as all of it) or "wrong" (one
bit flipped).
"""


class Bandwidth:
    """A bandwidth limit that all connections share.

    Args:
        rate: bytes per second; 0 for no limit.
    """

    def __init__(self, rate: float):
        self.rate, self.free_at, self.lock = rate, 0.0, threading.Lock()

    def wait(self, count: int) -> None:
        """Wait until `count` more bytes may be sent."""
        if not self.rate:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            delay = self.free_at - time.monotonic()
        time.sleep(max(0.0, delay))


class ObjectServer(ThreadingHTTPServer):
    """Serve a folder on a free port of 127.0.0.1; use it as a context manager.

    Args:
        folder: the folder to serve.
        latency: seconds before each answer.
        bandwidth: bytes per second of all connections together; 0 for no limit.
        fault: called for each GET of a file; returns the fault to produce, if any.

    Attributes:
        requests: number of requests for each (method, path).
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        folder: Path,
        latency: float = 0.0,
        bandwidth: float = 0.0,
        fault: Fault = lambda path, before: None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.latency, self.fault = folder, latency, fault
        self.bandwidth = Bandwidth(bandwidth)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method: str, path: str) -> int:
        """Count a request and return the number of earlier ones with this method and path."""
        with self.lock:
            before = self.requests[method, path]
            self.requests[method, path] += 1
        return before

    def count_gets(self, suffix: str = "") -> int:
        """Return the number of GET requests for files whose names end with `suffix`."""
        with self.lock:
            return sum(
                count
                for (method, path), count in self.requests.items()
                if method == "GET" and path.endswith(suffix)
            )

    def __enter__(self) -> "ObjectServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore the error: a client that hangs up is not an error of the server."""


class Handler(BaseHTTPRequestHandler):
    server: ObjectServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        """Do nothing: requests are counted, not logged."""

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        if self.path == "/?counts":
            with self.server.lock:
                counts = {" ".join(key): count for key, count in self.server.requests.items()}
            self.send_text(json.dumps(counts), "application/json")
        elif "list-type" in urlsplit(self.path).query:
            self.list_objects()
        else:
            self.answer("GET")

    def answer(self, method: str) -> None:
        """Send a file, a range of it, or its headers; apply a fault if one is due."""
        path = unquote(urlsplit(self.path).path)
        before = self.server.count(method, path)
        time.sleep(self.server.latency)
        fault = self.server.fault(path, before) if method == "GET" else None
        file = self.server.folder / path.lstrip("/")
        if fault is not None and fault.isdigit():
            return self.refuse(int(fault), "SlowDown" if fault == "503" else "InternalError")
        if not file.is_file():
            return self.refuse(404, "NoSuchKey")
        size = file.stat().st_size
        start, end = self.parse_range(size)
        if start >= size > 0:
            return self.refuse(416, "InvalidRange")
        declared = (end - start) // 2 if fault == "short" else end - start
        partial = "Range" in self.headers
        self.send_response(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK)
        self.send_header("Content-Length", str(declared))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{size:x}"')
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if method == "GET":
            self.send_body(file, start, start + declared, fault)

    def parse_range(self, size: int) -> tuple[int, int]:
        """Return the first byte requested and the one after the last."""
        unit, _, span = self.headers.get("Range", "bytes=0-").partition("=")
        first, _, last = span.partition("-")
        if unit != "bytes" or not first:
            return 0, size
        return int(first), min(size, int(last) + 1) if last else size

    def send_body(self, file: Path, start: int, end: int, fault: str | None) -> None:
        self.wfile.flush()
        with file.open("rb") as source:
            position = start
            while position < end:
                count = min(PIECE, end - position)
                if fault == "cut" and position + count > (start + end) // 2:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.server.bandwidth.wait(count)
                if fault == "wrong" and position == start:
                    source.seek(position)
                    spoiled = bytearray(source.read(count))
                    spoiled[count // 2] ^= 1
                    self.connection.sendall(spoiled)
                    position += count
                else:
                    position += os.sendfile(
                        self.connection.fileno(), source.fileno(), position, count
                    )

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def list_objects(self) -> None:
        """Answer ListObjectsV2 for one bucket, all in one page."""
        url = urlsplit(self.path)
        self.server.count("LIST", url.path)
        time.sleep(self.server.latency)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        bucket = self.server.folder / unquote(url.path).strip("/")
        rows, folders = [], set()
        for file in sorted(path for path in bucket.rglob("*") if path.is_file()):
            key = file.relative_to(bucket).as_posix()
            if not key.startswith(prefix):
                continue
            head, separator, _ = key[len(prefix) :].partition(delimiter or "\0")
            if separator:
                folders.add(prefix + head + delimiter)
                continue
            modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(file.stat().st_mtime))
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><Size>{file.stat().st_size}</Size>"
                f"<LastModified>{modified}</LastModified></Contents>"
            )
        rows += [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        ]
        body = (
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{escape(bucket.name)}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>false</IsTruncated>{''.join(rows)}"
            "</ListBucketResult>"
        )
        self.send_text(body, "application/xml")

    def send_text(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument(
        "--bandwidth", type=float, default=0.0, help="bytes per second; 0 for no limit"
    )
    options = parser.parse_args()
    with ObjectServer(options.folder, options.latency, options.bandwidth) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
