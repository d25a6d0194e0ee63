"""Measure training data from a distant S3: the first batch, the rate, and the requests.

A separate server process answers each request after a delay and shares one bandwidth limit among
all connections. The bucket holds the dataset; the cache holds only a part of it.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from bench.process import read_cpu_seconds, time_call
from bench.table import check_counts, repeat_forever
from pipeline import Cache, MaskedViews, get_recipe
from schemas import ShardDataset, UserError

BUCKET = "shards"


@dataclass(frozen=True)
class Options:
    """Compare first batch and images/s of shards in S3 with the same shards on the local disk."""

    data: str = tyro.MISSING
    """Local dataset of shards, which is served as the bucket of an S3 server."""
    out: Path = Path("out/bench-remote.json")
    """JSON file for the figures."""
    latency: float = 0.02
    """Seconds before the server answers a request."""
    bandwidth: float = 200e6
    """Bandwidth of all connections to the server together in bytes/s; 0 for no limit."""
    cache_share: float = 0.5
    """Size of the cache as a share of the dataset."""
    recipe: str = "hp"
    """Name of the recipe."""
    batch_size: int = 32
    """Images per batch."""
    shuffle_shards: int = 2
    """Shards per window of the shuffle."""
    epochs: int = 2
    """Number of timed epochs in each repeat, after its first batch."""
    repeats: int = 3
    """Number of repeats, each with an empty cache; local and remote alternate."""
    crop_size: int = 224
    """Side of a view in pixels."""
    device: str = "cpu"
    """Device of the loader: cpu or cuda."""

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "shuffle_shards", "epochs", "repeats", "crop_size")


@contextmanager
def serve_s3(folder: Path, options: Options) -> Iterator[tuple[str, int]]:
    """Serve a folder as S3 from another process, and set this process's environment to use it.

    Yields:
        The URL of the server and its process ID.
    """
    command = [
        sys.executable, "-m", "bench.object_store", str(folder),
        "--latency", str(options.latency), "--bandwidth", str(options.bandwidth),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise UserError("the S3 server did not start; its error is above")
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


def count_requests(url: str) -> int:
    """Return the number of requests for tars, indices and tables that the server has answered."""
    with urllib.request.urlopen(f"{url}/?counts") as answer:
        counts = json.load(answer)
    return sum(count for name, count in counts.items() if "/shards/0" in name)


@dataclass(frozen=True)
class Timing:
    """Time that the views of a dataset take.

    Attributes:
        first: seconds from the start to the first batch.
        rate: images/s of the epochs after it.
        cpu: CPU milliseconds per image of this process in these epochs.
        server_cpu: the same for the server.
    """

    first: float
    rate: float
    cpu: float
    server_cpu: float


def time_views(url: str, options: Options, cache: Cache | None, server: int) -> Timing:
    """Time the views of the dataset at `url`; `server` is the process ID of the server."""
    recipe = replace(get_recipe(options.recipe), crop_size=options.crop_size)
    start = time.perf_counter()
    views = MaskedViews(
        url,
        recipe,
        options.batch_size,
        options.device,
        cache=cache,
        shuffle_shards=options.shuffle_shards,
    )
    batches = repeat_forever(views)
    next(batches)
    first = time.perf_counter() - start
    count = options.epochs * len(views)
    images = count * options.batch_size
    server_before = read_cpu_seconds(server)
    _, seconds, cpu = time_call(lambda: deque(itertools.islice(batches, count), maxlen=0))
    server_cpu = read_cpu_seconds(server) - server_before
    views.close()
    return Timing(first, images / seconds, 1e3 * cpu / images, 1e3 * server_cpu / images)


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Time the local dataset and the same one behind S3 in turn.

    Args:
        folder: an empty folder for the bucket and the caches.
    """
    dataset = ShardDataset.open(options.data)
    if not dataset.store.is_local:
        raise UserError(f"{options.data}: must be a local dataset; the bench serves it itself")
    (folder / "store").mkdir()
    (folder / "store" / BUCKET).symlink_to(Path(dataset.url).resolve())
    sizes = sorted((row.bytes for row in dataset.shards), reverse=True)
    limit = int(options.cache_share * sum(sizes))
    rows: list[dict[str, float]] = []
    with serve_s3(folder / "store", options) as (url, server):
        for repeat in range(options.repeats):
            before = count_requests(url)
            cache = Cache(folder / f"cache-{repeat}", limit)
            local = time_views(dataset.url, options, None, server)
            remote = time_views(f"s3://{BUCKET}", options, cache, server)
            rows.append(
                {
                    "first_local": local.first,
                    "first": remote.first,
                    "local": local.rate,
                    "remote": remote.rate,
                    "share": remote.rate / local.rate,
                    "cpu_local": local.cpu,
                    "cpu": remote.cpu,
                    "cpu_server": remote.server_cpu,
                    "requests": count_requests(url) - before,
                }
            )
    window = sum(sizes[: options.shuffle_shards])
    download = window / options.bandwidth if options.bandwidth else 0.0
    return {
        "rows": rows,
        "median": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "shards": len(sizes),
        "window_bytes": window,
        "window_download_seconds": download,
        "dataset_bytes": sum(sizes),
        "cache_bytes": limit,
    }


def report(figures: dict[str, Any], options: Options) -> str:
    """Return the medians as lines for the terminal."""
    median = figures["median"]
    return "\n".join(
        [
            f"### S3 with {1e3 * options.latency:g} ms per request and "
            f"{options.bandwidth / 1e6:g} MB/s; cache {figures['cache_bytes'] / 1e6:.0f} of "
            f"{figures['dataset_bytes'] / 1e6:.0f} MB; median of {options.repeats}",
            "",
            "| | local | S3 |",
            "| --- | ---: | ---: |",
            f"| first batch, s | {median['first_local']:.2f} | {median['first']:.2f} |",
            f"| images/s | {median['local']:.0f} | {median['remote']:.0f} |",
            f"| CPU ms per image | {median['cpu_local']:.2f} | {median['cpu']:.2f} |",
            f"| of the server | | {median['cpu_server']:.2f} |",
            "",
            f"Rate: {median['share']:.1%} of local. Download of one window "
            f"({figures['window_bytes'] / 1e6:.0f} MB): {figures['window_download_seconds']:.2f} s"
            f". Requests for the {figures['shards']} shards in the first batch and "
            f"{options.epochs} epochs: {median['requests']:.0f}.",
        ]
    )
