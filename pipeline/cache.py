"""A local copy of shards from elsewhere, of bounded size, shared by the processes of a host.

    CACHE/lock              held while room is made
    CACHE/DIGEST/in-use     locked, shared, by every process that reads the copy
    CACHE/DIGEST/bytes      what the copy takes when whole
    CACHE/DIGEST/shards/    the copy; each file is written under another name and renamed

Locks are the kernel's (flock): those of a process that is killed are gone with it. The folder lies
on a local disk.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from schemas import ShardDataset, ShardRow, UserError
from schemas.storage import Store
from schemas.tables import shard_name

MOUNTS = Path("/proc/mounts")
NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse"}
"""File systems that fetch over a network and keep nothing on the local disk."""

DOWNLOADS_AT_A_TIME = 8
CHUNK = 1 << 22


@dataclass(frozen=True)
class Cache:
    """Where copies lie and how many bytes all of them may take.

    Attributes:
        folder: on a local disk; made when it is not there.
        limit: bytes. The dataset in use has to fit; others make room, the one used last goes last.
    """

    folder: Path
    limit: int


@dataclass(frozen=True)
class Copy:
    """A whole copy. It stays as long as this object: others may not remove what is in use."""

    store: Store
    in_use: IO[bytes]


def network_mount(url: str) -> str | None:
    """The kind of the network file system that a local path lies on; None for any other place."""
    if "://" in url or not MOUNTS.exists():
        return None
    path = Path(url).resolve()
    mounts = (line.split() for line in MOUNTS.read_text().splitlines())
    kinds = {Path(point.replace("\\040", " ")): kind for _, point, kind, *_ in mounts}
    above = [point for point in (path, *path.parents) if point in kinds]
    return kinds[above[0]] if above and kinds[above[0]] in NETWORK else None


def fetch(dataset: ShardDataset, cache: Cache) -> Copy:
    """Copy what is not there yet of the shards and their indices, each checked by its sha256.

    Raises:
        UserError: it does not fit, the disk is full, or a shard is not what the table says.
    """
    home = cache.folder / dataset.digest
    rows = [row for row in dataset.shards if row.samples]
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with locked(cache.folder / "lock"):
            home.mkdir(exist_ok=True)
            in_use = (home / "in-use").open("ab")
            fcntl.flock(in_use, fcntl.LOCK_SH)
            os.utime(home / "in-use")
            make_room(cache, dataset, sum(row.bytes for row in rows))
        with ThreadPoolExecutor(DOWNLOADS_AT_A_TIME) as pool:
            list(pool.map(lambda row: fetch_shard(dataset, row, home), rows))
    except OSError as error:
        raise UserError(
            f"copying {dataset.url} to {cache.folder}: {error.strerror or error}"
        ) from error
    return Copy(Store(home), in_use)


def make_room(cache: Cache, dataset: ShardDataset, needed: int) -> None:
    """Remove copies that nobody reads, oldest use first, until this one fits."""
    home = cache.folder / dataset.digest
    (home / "bytes").write_text(str(needed))
    for left in cache.folder.glob("*.removed"):  # by a process that was killed there
        shutil.rmtree(left)
    sizes = {path.parent: int(path.read_text()) for path in cache.folder.glob("*/bytes")}
    others = sorted(set(sizes) - {home}, key=lambda copy: (copy / "in-use").stat().st_mtime)
    for copy in others:
        if sum(sizes.values()) <= cache.limit:
            return
        with (copy / "in-use").open("ab") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(copy.rename(copy.with_suffix(".removed")))
            del sizes[copy]
    if sum(sizes.values()) > cache.limit:
        (home / "bytes").write_text("0")
        raise UserError(
            f"cache {cache.folder}: {dataset.url} takes {needed} bytes, other datasets in use "
            f"{sum(sizes.values()) - needed}, and the limit is {cache.limit}; raise it"
        )


def fetch_shard(dataset: ShardDataset, row: ShardRow, home: Path) -> None:
    """Copy one shard and its index unless they are there; the index comes last."""
    tar, index = shard_name(row.shard, "tar"), shard_name(row.shard, "idx")
    (home / tar).parent.mkdir(exist_ok=True)
    with locked((home / tar).with_suffix(".lock")):
        whole = (home / index).exists() and (home / tar).exists()
        if whole and (home / tar).stat().st_size == row.bytes:
            return
        found = copy_file(dataset.store, tar, home / tar)
        if found != row.sha256:
            (home / tar).unlink()
            raise UserError(
                f"{dataset.store.location(tar)}: shard {row.shard} has sha256 {found}, the table "
                f"says {row.sha256}; `python -m schemas verify` shows all that is wrong"
            )
        copy_file(dataset.store, index, home / index)


def copy_file(store: Store, name: str, target: Path) -> str:
    """Copy a file atomically; returns its sha256."""
    digest, partial = hashlib.sha256(), target.with_name(target.name + ".part")
    try:
        with store.open(name) as source, partial.open("wb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except FileNotFoundError as error:
        raise UserError(f"{store.location(name)} is missing") from error
    partial.replace(target)
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file alone, waiting for whoever holds it."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
