"""Build shards inside a Ray actor: read and check images, estimate saliency, write samples.

Reading, decoding and packing (with writing) each run in separate threads, in parallel with the
estimator. The threads live as long as the builder, because DALI keeps its decoders by thread and
would create new ones in a new thread.
"""

import errno
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import numpy as np

from precompute.decode import decode, decode_batch, split_by_pixels
from precompute.device_failure import translate_device_errors
from precompute.estimators import Estimator
from precompute.reads import PendingReads
from precompute.reencode import EncodedImage, RejectedError, Resize, check
from precompute.sources import Source, SourceImage
from precompute.sources.base import count_readers
from schemas.errors import UserError
from schemas.sample import Sample
from schemas.shard import ShardMarker, write_shard
from schemas.storage import NotAFileError, Store
from schemas.tables import Reject

T = TypeVar("T")

# called after each group of images with the numbers of written and rejected ones
Advance = Callable[[int, int], None]

PACKED_LATER = 2
"""Number of groups of samples that may wait for the packer before the estimator waits too."""

WAIT_SECONDS = 0.1

OF_ONE_FILE = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
        *(errno.ELOOP, errno.ENAMETOOLONG),
    }
)
"""Errors that concern a single file. Any other error (no memory, too many open files, a store that
does not answer, expired credentials) would cause valid images to be rejected one after the other,
so it ends the job."""


class Decoded(NamedTuple):
    """A group of images with their pixels (None if there are no images), and the rejects."""

    images: list[EncodedImage]
    pixels: Any
    rejects: list[Reject]


class ShardBuilder:
    """Builds shards, one at a time.

    Batches depend only on the plan and the images' headers, not on whether images decode, so the
    bytes of a shard do not depend on where an earlier run was interrupted.

    Args:
        source: the source of the images.
        estimator: the saliency estimator.
        store: folder of the dataset.
        batch_size: number of images decoded and estimated together.
        resize: options for shrinking large images.
        settings: the job's settings, for the shard's marker.
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
        self.read_at_once = count_readers(source)
        self.readers = ThreadPoolExecutor(self.read_at_once, "read")
        self.decoder = ThreadPoolExecutor(1, "decode")
        self.packer = ThreadPoolExecutor(1, "pack")
        self.reads = PendingReads()
        self.has_estimated = False

    def build(
        self,
        shard: int,
        images: list[SourceImage],
        advance: Advance = lambda written, rejected: None,
        refused: Mapping[str, str] | None = None,
    ) -> ShardMarker:
        """Write one shard.

        Args:
            shard: the number of the shard.
            images: the images of the shard, in order.
            advance: called with the progress; by default nothing is.
            refused: reasons for images that must not be read, by key.

        Raises:
            UserError: its folder cannot be written to, the source does not answer, or the decoder
                or the estimator fails because of the machine.
        """
        rejects: list[Reject] = []  # write_shard reads it only after the last sample
        samples = Handover[Sample]()
        shard_written = self.packer.submit(
            write_shard, self.store, shard, samples, rejects, self.settings
        )
        try:
            for batch, batch_rejects in self.make(images, refused or {}):
                rejects += batch_rejects
                if not samples.put(batch, shard_written):
                    break
                advance(len(batch), len(batch_rejects))
        except BaseException:
            samples.abandon(shard_written)
            raise
        samples.end(shard_written)
        return shard_written.result()

    def make(
        self, images: list[SourceImage], refused: Mapping[str, str]
    ) -> Iterator[tuple[list[Sample], list[Reject]]]:
        """Make samples without writing them; yield samples and rejects, a group at a time."""
        for group in prefetch(self.decode_batches(self.read(images, refused)), self.decoder):
            samples, rejects = self.estimate(group.images, group.pixels)
            yield samples, group.rejects + rejects

    def read(
        self, images: list[SourceImage], refused: Mapping[str, str]
    ) -> Generator[list[EncodedImage | Reject]]:
        """Read and check batch after batch, prefetching images of the following batches."""
        reading: deque[Future[EncodedImage | Reject]] = deque()
        coming = iter(images)
        try:
            for start in range(0, len(images), self.batch_size):
                for image in coming:
                    reading.append(self.readers.submit(self.read_one, image, refused))
                    if len(reading) >= self.batch_size + self.read_at_once:
                        break
                size = min(self.batch_size, len(images) - start)
                yield [reading.popleft().result() for _ in range(size)]
        finally:
            for future in reading:
                future.cancel()

    def read_one(self, image: SourceImage, refused: Mapping[str, str]) -> EncodedImage | Reject:
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
        except (UserError, MemoryError):
            raise
        except Exception as error:  # from the source's own reader, such as for a damaged archive
            return Reject(image.location, "unreadable", f"{type(error).__name__}: {error}")

    def decode_batches(self, batches: Generator[list[EncodedImage | Reject]]) -> Generator[Decoded]:
        """Decode batch after batch; closing this generator closes `batches`."""
        with closing(batches):
            yield from self.decode_groups(batches)

    def decode_groups(self, batches: Iterable[list[EncodedImage | Reject]]) -> Generator[Decoded]:
        for batch in batches:
            rejects = [entry for entry in batch if isinstance(entry, Reject)]
            if rejects:
                yield Decoded([], None, rejects)
            encoded = [entry for entry in batch if isinstance(entry, EncodedImage)]
            for group in split_by_pixels(encoded):
                yield Decoded(*decode(group))

    def estimate(
        self, encoded: list[EncodedImage], pixels: Any
    ) -> tuple[list[Sample], list[Reject]]:
        """Make samples of decoded images, and reject images on which the estimator fails.

        Raises:
            UserError: a GPU fails, or memory runs out; no image is rejected then.
            Exception: the estimator's own error, if it has not worked on any image so far, or
                fails on a batch of images but on none of them alone.
        """
        if not encoded:
            return [], []
        try:
            return self.make_samples(encoded, pixels), []
        except UserError:
            raise
        except Exception:
            samples, rejects = self.estimate_one_by_one(encoded)
            if not rejects:  # no image is at fault; maps made one by one differ in the last bits
                raise
            return samples, rejects

    def estimate_one_by_one(self, encoded: list[EncodedImage]) -> tuple[list[Sample], list[Reject]]:
        samples: list[Sample] = []
        rejects: list[Reject] = []
        last: Exception | None = None
        for encoded_image in encoded:
            try:
                with translate_device_errors("the decoder fails"):
                    pixels = decode_batch([encoded_image])
                samples += self.make_samples([encoded_image], pixels)
            except UserError:
                raise
            except Exception as error:
                last = error
                detail = f"{type(error).__name__}: {error}"
                rejects.append(Reject(encoded_image.image.location, "estimator-fails", detail))
        if last and not self.has_estimated:  # it has never worked: the estimator is at fault
            raise last from None
        return samples, rejects

    def make_samples(self, encoded: list[EncodedImage], pixels: Any) -> list[Sample]:
        with translate_device_errors("the estimator fails"):
            maps = self.estimator(pixels)
        if not np.isfinite(maps).all():
            raise ValueError("the estimator gave values that are not finite")
        self.has_estimated = True
        samples = []
        for encoded_image, image, saliency in zip(encoded, pixels, maps, strict=True):
            height, width, _ = image.shape
            samples.append(
                Sample(
                    key=encoded_image.image.key,
                    image=encoded_image.content,
                    extension=encoded_image.extension,
                    saliency=saliency,
                    label=encoded_image.image.label,
                    height=height,
                    width=width,
                    source=encoded_image.image.location,
                    reencoded=encoded_image.reencoded,
                    members=encoded_image.members,
                )
            )
        return samples


def read_members(source: Source, image: SourceImage) -> dict[str, bytes]:
    """Read the other members of an image's sample. Raises RejectedError, OSError, UserError."""
    try:
        return source.members(image)
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:
        raise RejectedError(image, "bad-annotation", str(error)) from error


class Handover(Iterator[T]):
    """A queue that passes groups of items to another thread, which iterates over single items.

    The producer's methods take the consumer's future, because a consumer that has ended by an error
    would leave the producer waiting forever.
    """

    def __init__(self) -> None:
        self.groups: queue.Queue[list[T] | None] = queue.Queue(maxsize=PACKED_LATER)
        self.group: Iterator[T] = iter(())
        self.abandoned = False

    def put(self, group: list[T] | None, taker: Future) -> bool:
        """Wait until there is room for a group; return False if the consumer has ended."""
        while not taker.done():
            try:
                self.groups.put(group, timeout=WAIT_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def end(self, taker: Future) -> None:
        """Signal that no item follows."""
        self.put(None, taker)

    def abandon(self, taker: Future) -> None:
        """Make the consumer fail, so that it writes nothing, and wait until it has ended."""
        self.abandoned = True
        self.end(taker)
        taker.exception()

    def __next__(self) -> T:
        while True:
            for item in self.group:
                return item
            group = self.groups.get()
            if self.abandoned:
                raise AbandonedError
            if group is None:
                raise StopIteration
            self.group = iter(group)


class AbandonedError(Exception):
    """Raised in the consumer when the producer has failed, so that no shard is written."""


def prefetch(items: Generator[T], executor: ThreadPoolExecutor) -> Generator[T]:
    """Yield the items, prefetching the next one in the executor's single thread."""
    end = object()

    def advance() -> Any:
        return next(items, end)

    future = executor.submit(advance)
    try:
        while (item := future.result()) is not end:
            future = executor.submit(advance)
            yield item
    finally:
        future.cancel()
        executor.submit(items.close).result()
