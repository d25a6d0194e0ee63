"""ShardBuilder: read, check, estimate and write one shard. Runs inside a Ray actor.

Reading runs in threads of its own and decoding in another, both a batch ahead of the estimator.
"""

import errno
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from precompute.decode import decode, decode_batch, within_memory
from precompute.encode import EncodedImage, RejectedError, Resize, check
from precompute.estimators import Estimator
from precompute.reads import PendingReads
from precompute.sources import Source, SourceImage
from schemas.errors import UserError
from schemas.sample import Sample
from schemas.shard import ShardMarker, write_shard
from schemas.storage import NotAFileError, Store
from schemas.tables import Reject

T = TypeVar("T")

# called after each batch with how many of its images were written and how many rejected
Advance = Callable[[int, int], None]

READERS = 8
"""Images read at a time: enough to hide an object store's latency from an estimator."""

OF_ONE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.ELOOP, errno.ENAMETOOLONG),
    }
)
"""Errors that say something of one file. Any other (no memory, too many open files, a store that
does not answer, rights that have run out) would reject image after image that is sound, so it ends
the job."""


class Decoded(NamedTuple):
    """A group of images with their pixels (None when there are none), and what was rejected."""

    images: list[EncodedImage]
    pixels: Any
    rejects: list[Reject]


class ShardBuilder:
    """Builds shards one at a time.

    Batches are cut by the plan and the images' headers alone, before anything is rejected for what
    its pixels are, so a shard's bytes do not depend on where an earlier run was interrupted.

    Args:
        batch_size: images that are decoded and estimated together.
        resize: what is made smaller before it is written.
        settings: what the job was asked to do, for the shard's marker.
    """

    def __init__(
        self,
        source: Source,
        estimator: Estimator,
        store: Store,
        batch_size: int,
        resize: Resize,
        settings: dict[str, Any],
    ):
        self.source = source
        self.estimator = estimator
        self.store = store
        self.batch_size = batch_size
        self.resize = resize
        self.settings = settings
        self.reads = PendingReads()
        self.has_estimated = False

    def build(
        self,
        shard: int,
        images: list[SourceImage],
        advance: Advance,
        refused: Mapping[str, str] | None = None,
    ) -> ShardMarker:
        """Write one shard.

        Args:
            refused: keys of images that must not be touched, and why.

        Raises:
            UserError: its folder cannot be written to, or the source does not answer.
        """
        samples: list[Sample] = []
        rejects: list[Reject] = []
        for made, bad in self.make(images, refused or {}):
            samples += made
            rejects += bad
            advance(len(made), len(bad))
        return write_shard(self.store, shard, samples, rejects, self.settings)

    def make(
        self, images: list[SourceImage], refused: Mapping[str, str]
    ) -> Iterator[tuple[list[Sample], list[Reject]]]:
        """Everything but the writing, a group of images at a time."""
        for group in ahead(self.decoded(ahead(self.read(images, refused)))):
            samples, rejects = self.estimate(group.images, group.pixels)
            yield samples, group.rejects + rejects

    def read(
        self, images: list[SourceImage], refused: Mapping[str, str]
    ) -> Generator[list[EncodedImage | Reject]]:
        def read_one(image: SourceImage) -> EncodedImage | Reject:
            if why := refused.get(image.key):
                return Reject(image.location, "kills-worker", why)
            try:
                with self.reads.begin(image.location):
                    content = self.source.read(image)
                with self.reads.begin(f"{image.location} (its annotation)"):
                    members = read_members(self.source, image)
                return check(image, content, members, self.resize)
            except RejectedError as error:
                return error.reject
            except NotAFileError as error:
                return Reject(image.location, "not-a-file", str(error))
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and error.errno not in OF_ONE_FILE:
                    raise UserError(f"{image.location}: the source fails: {error}") from error
                return Reject(image.location, "unreadable", f"{type(error).__name__}: {error}")
            except UserError:
                raise
            except Exception as error:  # of the source's own reader, say of a damaged archive
                return Reject(image.location, "unreadable", f"{type(error).__name__}: {error}")

        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, len(images), self.batch_size):
                yield list(pool.map(read_one, images[start : start + self.batch_size]))

    def decoded(self, batches: Iterable[list[EncodedImage | Reject]]) -> Generator[Decoded]:
        for batch in batches:
            rejects = [entry for entry in batch if isinstance(entry, Reject)]
            if rejects:
                yield Decoded([], None, rejects)
            encoded = [entry for entry in batch if isinstance(entry, EncodedImage)]
            for group in within_memory(encoded):
                yield Decoded(*decode(group))

    def estimate(
        self, encoded: list[EncodedImage], pixels: Any
    ) -> tuple[list[Sample], list[Reject]]:
        """Make samples of decoded images, and reject those that the estimator alone fails on."""
        if not encoded:
            return [], []
        try:
            return self.samples_of(encoded, pixels), []
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            # of one image, or of all that there were so far: then the estimator is at fault
            samples, rejects, last = [], [], None
            for one in encoded:
                try:
                    samples += self.samples_of([one], decode_batch([one]))
                except Exception as error:
                    last = error
                    detail = f"{type(error).__name__}: {error}"
                    rejects.append(Reject(one.image.location, "estimator-fails", detail))
            if last and not samples and not self.has_estimated:
                raise last from None
            return samples, rejects

    def samples_of(self, encoded: list[EncodedImage], pixels: Any) -> list[Sample]:
        maps = self.estimator(pixels)
        if not np.isfinite(maps).all():
            raise ValueError("the estimator gave values that are not finite")
        self.has_estimated = True
        samples = []
        for one, image, saliency in zip(encoded, pixels, maps, strict=True):
            height, width, _ = image.shape
            samples.append(
                Sample(
                    key=one.image.key,
                    image=one.content,
                    extension=one.extension,
                    saliency=saliency,
                    label=one.image.label,
                    height=height,
                    width=width,
                    source=one.image.location,
                    reencoded=one.reencoded,
                    members=one.members,
                )
            )
        return samples


def read_members(source: Source, image: SourceImage) -> dict[str, bytes]:
    """Read what is kept beside an image. Raises RejectedError, OSError, UserError."""
    try:
        return source.members(image)
    except (OSError, UserError):
        raise
    except Exception as error:
        raise RejectedError(image, "bad-annotation", str(error)) from error


def ahead(items: Generator[T]) -> Generator[T]:
    """The same items, the next one made in a thread while this one is used."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)
    over = threading.Event()

    def put(kind: str, item: Any) -> bool:
        while not over.is_set():
            try:
                made.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put("item", item):
                        return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        over.set()
        thread.join()
