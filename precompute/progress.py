"""Show the progress of listing and of a job: a bar on a terminal, plain lines otherwise."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import ray
from tqdm import tqdm

from precompute.background import run_in_background
from schemas.counts import format_count, join_first

T = TypeVar("T")

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0
STALL_SECONDS = 300.0
ANSWER_SECONDS = 10.0
"""Seconds to wait for an actor's counts (our choice). An actor that hangs must hold up neither the
messages about a stalled job nor its end."""
SHOWN = 8
SILENT = (
    "no progress: Ray's process that counts it does not answer; if that does not change, stop this "
    "command and run it again to resume"
)


def show_listing(entries: Iterable[T]) -> Iterator[T]:
    """Yield the entries of a source; show their number and rate if listing takes long."""
    shown = tqdm(
        entries,
        desc="listing",
        unit=" files",
        delay=1.0,
        leave=False,
        mininterval=POLL_SECONDS if sys.stderr.isatty() else LINE_SECONDS,
        ascii=not sys.stderr.isatty(),
    )
    waits: list[Any] = ["before its first file", time.monotonic()]

    def watch(stop: threading.Event) -> None:
        while not stop.wait(POLL_SECONDS):
            if time.monotonic() - waits[1] >= STALL_SECONDS:
                print(
                    f"listing is stuck {waits[0]}: is the disk still there?",
                    file=sys.stderr,
                    flush=True,
                )
                waits[1] = time.monotonic()

    with run_in_background(watch):
        for entry in shown:
            yield entry
            location = getattr(entry, "location", None)
            waits[:] = f"after {location}" if location else waits[0], time.monotonic()


def watch_count(actor: Any) -> AbstractContextManager[None]:
    """Show the count of a CountActor, and its rate, until the block ends."""
    return run_in_background(show_count, actor)


def show_count(actor: Any, stop: threading.Event) -> None:
    terminal = sys.stderr.isatty()
    with tqdm(
        desc="listing on the cluster",
        unit=" files",
        leave=False,
        mininterval=POLL_SECONDS if terminal else LINE_SECONDS,
        ascii=not terminal,
    ) as bar:
        while not stop.wait(POLL_SECONDS):
            try:
                bar.update(ray.get(actor.total.remote(), timeout=ANSWER_SECONDS) - bar.n)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return  # the job itself gets the error and reports it


def watch(actor: Any, images: int, shards: int) -> AbstractContextManager[None]:
    """Show the actor's counts until the block ends, and the pending shards when it stalls."""
    return run_in_background(show, actor, images, shards)


def show(actor: Any, images: int, shards: int, stop: threading.Event) -> None:
    terminal = sys.stderr.isatty()
    moved, counted, reported = time.monotonic(), 0, time.monotonic()
    with tqdm(
        total=images, unit="image", smoothing=0.1, dynamic_ncols=True, disable=not terminal
    ) as bar:
        start = time.monotonic()
        while True:
            last = stop.wait(POLL_SECONDS)
            try:
                (written, rejected, finished), pending, reads = get_counts(actor)
            except ray.exceptions.GetTimeoutError:
                if last:
                    return
                if time.monotonic() - moved >= STALL_SECONDS:
                    moved = time.monotonic()
                    bar.write(SILENT, file=sys.stderr)
                continue
            except ray.exceptions.RayError:
                return  # the job itself gets the error and reports it
            now, done = time.monotonic(), written + rejected
            if done != counted:
                moved, counted = now, done
            bar.update(done - bar.n)
            state = f"{finished}/{format_count(shards, 'shard')}, {rejected} rejected"
            bar.set_postfix_str(state, refresh=False)
            if not terminal and (last or now - reported >= LINE_SECONDS):
                reported = now
                left = tqdm.format_interval((images - done) * (now - start) / done) if done else "?"
                print(
                    f"{done}/{format_count(images, 'image')}, {done / (now - start):.1f} images/s, "
                    f"{state}, {left} left",
                    flush=True,
                )
            if now - moved >= STALL_SECONDS:
                moved = now
                bar.write(describe_stall(pending, reads), file=sys.stderr)
            if last:
                return


def get_counts(actor: Any) -> list[Any]:
    """Return the totals, the pending shards and the slow reads of a ProgressActor.

    Raises:
        RayError: it has ended; as a GetTimeoutError, it does not answer.
    """
    counts = [actor.totals.remote(), actor.pending.remote(), actor.slow_reads.remote()]
    return ray.get(counts, timeout=ANSWER_SECONDS)


def describe_stall(pending: dict[int, float], reads: Mapping[str, float] | None = None) -> str:
    """Return a message that says what a job without progress is waiting for.

    Args:
        pending: seconds since each unfinished shard was started.
        reads: seconds that each slow read has taken so far, by input.
    """
    if reads:
        slow = [f"{name} (for {seconds:.0f} s)" for name, seconds in reads.items()]
        return (
            f"no progress: these reads do not end: {join_first(slow, SHOWN)}; is the disk, the "
            "mount or the store still there?"
        )
    if not pending:
        return "no progress, and no shard has been started: does the cluster have free cores?"
    started = [f"{shard} (for {seconds:.0f} s)" for shard, seconds in pending.items()]
    return f"no progress; started but not finished: shards {join_first(started, SHOWN)}"
