"""Compare every byte of a dataset with its tables."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.counts import format_count
from schemas.errors import FormatError, UserError, summarize_error
from schemas.parallel import map_ahead
from schemas.saliency import SaliencyMap
from schemas.sample import IMAGE_EXTENSIONS, LABEL_MEMBER, SALIENCY_MEMBER
from schemas.shard import Member, build_index, list_members, read_marker
from schemas.storage import Store
from schemas.table_writer import KeyHashes
from schemas.tables import CARD, REJECTS, SAMPLES, SHARD_FOLDER, SHARDS, ShardRow, shard_name
from schemas.verify_record import Problem, VerifyRecord

if TYPE_CHECKING:
    from schemas.dataset import ShardDataset

SHOWN = 20
"""Number of problems in `str(report)`; the commands print all of them."""

Placed = tuple[ShardRow, tuple[int, int]]
"""A shard, and the (start, stop) of its rows in the table of samples."""
CheckShards = Callable[[Sequence[Placed]], Iterable[tuple[ShardRow, list[Problem]]]]


@dataclass(frozen=True)
class VerifyReport:
    """Result of a verification: the amount of data read, and every problem found in it.

    Attributes:
        shards, samples, bytes: amounts read by this run.
        skipped: number of shards that earlier runs with the same record had read.
        total: number of shards in the dataset.
    """

    url: str
    shards: int
    samples: int
    bytes: int
    problems: list[Problem]
    skipped: int = 0
    total: int = 0

    @property
    def clean(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return self.describe(SHOWN)

    def describe(self, shown: int | None = None) -> str:
        """Return a line for the amounts and one for each problem, or for the first `shown`."""
        shards = format_count(self.shards, "shard")
        if self.shards + self.skipped < self.total:
            total = format_count(self.total, "shard")
            shards = f"{self.shards} of {total} (the others were not looked at)"
        if self.skipped:
            shards += f", {self.skipped} more by earlier runs"
        samples = format_count(self.samples, "sample")
        read = f"{samples}, {shards}, {self.bytes / 1e6:.1f} MB read"
        if self.clean:
            return f"{self.url}: clean: {read}"
        lines = [f"  {problem.where}: {problem.what}" for problem in self.problems[:shown]]
        if len(lines) < len(self.problems):
            lines.append(f"  ... and {len(self.problems) - len(lines)} more")
        problems = format_count(len(self.problems), "problem")
        return "\n".join([f"{self.url}: {problems}: {read}", *lines])


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification.

    Attributes:
        workers: number of shards read in parallel; each is held in memory as a whole.
        shards: number of shards to verify, drawn at random by `seed`; None for all of them. With a
            number, the checks over the columns of all rows (repeated keys, labels without a class)
            are skipped.
        record: file that records the shards verified without a problem, to resume from; None for
            none.
    """

    workers: int = 4
    shards: int | None = None
    seed: int = 0
    record: Path | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")

    def choose(self, rows: Sequence[ShardRow]) -> list[ShardRow]:
        """Return the shards to verify, in order."""
        if self.shards is None or self.shards >= len(rows):
            return list(rows)
        places = random.Random(self.seed).sample(range(len(rows)), self.shards)
        return [rows[place] for place in sorted(places)]


def verify_dataset(
    dataset: ShardDataset,
    options: VerifyOptions,
    progress: Callable[[int], None] | None = None,
    check: CheckShards | None = None,
) -> VerifyReport:
    """Compare the bytes of a dataset with its tables; see `ShardDataset.verify`.

    Args:
        progress: called after each shard with its number of samples.
        check: runs `check_shard` on the shards elsewhere, and yields the results in the order
            given; by default threads of this process do it.

    Raises:
        UserError: the record cannot be used.
    """
    chosen = options.choose(dataset.shards)
    problems, ranges = check_tables(dataset, all_rows=len(chosen) == len(dataset.shards))

    def check_here(rows: Sequence[Placed]) -> Iterator[tuple[ShardRow, list[Problem]]]:
        results = map_ahead(
            lambda placed: list(check_shard(dataset, *placed)), rows, options.workers
        )
        return zip((row for row, _ in rows), results, strict=True)

    with VerifyRecord(options.record, dataset.digest) as record:
        rows = [row for row in chosen if row.shard not in record.clean]
        placed = [(row, ranges.get(row.shard, (0, 0))) for row in rows]
        for row, shard_problems in (check or check_here)(placed):
            problems += shard_problems
            record.add(row, shard_problems)
            if progress:
                progress(row.samples)
    return VerifyReport(
        dataset.url,
        len(rows),
        sum(row.samples for row in rows),
        sum(row.bytes for row in rows),
        problems,
        len(chosen) - len(rows),
        len(dataset.shards),
    )


@contextmanager
def list_errors(problems: list[Problem], name: str) -> Iterator[None]:
    """Turn the reason why a file or folder cannot be read into a problem of it."""
    try:
        yield
    except (OSError, UserError) as error:
        problems.append(Problem(name, summarize_error(error)))


def check_tables(
    dataset: ShardDataset, all_rows: bool
) -> tuple[list[Problem], dict[int, tuple[int, int]]]:
    """Compare the card, the tables and the listing of the folder.

    Args:
        all_rows: whether to check the columns of all rows too.

    Returns:
        The problems, and the (start, stop) rows of each shard in the table of samples; no rows if
        the table cannot be read.
    """
    card, shards = dataset.card, {row.shard for row in dataset.shards}
    problems: list[Problem] = []
    ranges: dict[int, tuple[int, int]] = {}
    with list_errors(problems, SAMPLES):
        problems += compare_count(card.samples, "sample", SAMPLES, dataset.samples_unchecked)
    problems += compare_count(card.shards, "shard", SHARDS, dataset.shards)
    with list_errors(problems, REJECTS):
        problems += compare_count(card.rejects, "reject", REJECTS, dataset.rejects)
    with list_errors(problems, SHARD_FOLDER):
        problems += check_folder(dataset.store, shards)
    if all_rows:
        with list_errors(problems, SAMPLES):
            problems += check_columns(dataset)
    with list_errors(problems, SAMPLES):
        ranges = dataset.samples_unchecked.ranges()
    if unknown := ranges.keys() - shards:
        problems.append(
            Problem(SAMPLES, f"has samples of shards {sorted(unknown)}, which {SHARDS} lacks")
        )
    return list(dict.fromkeys(problems)), ranges  # a damaged table gives an error in each check


def compare_count(count: int, noun: str, name: str, table: Sized) -> Iterator[Problem]:
    """Compare a count of the card with the rows of the table called `name`."""
    if count != len(table):
        yield Problem(CARD, f"counts {format_count(count, noun)}, {name} has {len(table)}")


def check_folder(store: Store, shards: set[int]) -> Iterator[Problem]:
    """Find files that belong to none of these shards."""
    expected = {
        shard_name(shard, suffix) for shard in shards for suffix in ("tar", "idx", "parquet")
    }
    for file in store.sizes(SHARD_FOLDER):
        if f"{SHARD_FOLDER}/{file}" not in expected:
            yield Problem(f"{SHARD_FOLDER}/{file}", f"not a file of any shard in {SHARDS}")


def check_columns(dataset: ShardDataset) -> Iterator[Problem]:
    """Find repeated keys and labels without a class, one part of the table at a time."""
    hashes, labels = KeyHashes(), set()
    for batch in dataset.samples_unchecked.batches(["key", "label"]):
        hashes.add(batch["key"].to_pylist())
        labels |= set(batch["label"].unique().to_pylist())
    if repeated := hashes.repeated():
        counts: Counter[str] = Counter()
        for batch in dataset.samples_unchecked.batches(["key"]):
            counts.update(key for key in batch["key"].to_pylist() if hash(key) in repeated)
        for key in sorted(key for key, count in counts.items() if count > 1):
            yield Problem(SAMPLES, f"has the key {key} more than once")
    classes = len(dataset.card.classes)
    if wrong := {label for label in labels if label >= classes}:
        count = format_count(classes, "class", "classes")
        yield Problem(SAMPLES, f"has labels {sorted(wrong)} of {count}")


def check_shard(dataset: ShardDataset, row: ShardRow, place: tuple[int, int]) -> Iterator[Problem]:
    """Compare one shard's tar, index and marker with the tables.

    Args:
        place: (start, stop) of its rows in the table of samples.
    """
    store, name = dataset.store, shard_name(row.shard, "tar")
    try:
        expected = dataset.samples_unchecked.rows(*place).to_pylist()
    except (OSError, UserError) as error:
        yield Problem(name, f"not checked: {summarize_error(error)}")
        return
    if row.samples != len(expected):
        yield Problem(
            SHARDS,
            f"{name} has {format_count(row.samples, 'sample')}, {SAMPLES} {len(expected)}",
        )
    yield from check_marker(dataset, row, expected)
    tar = read_file(store, name)
    if isinstance(tar, Problem):
        yield tar
        return
    if len(tar) != row.bytes:
        yield Problem(name, f"has {len(tar)} bytes, the table says {row.bytes}")
    is_intact = hashlib.sha256(tar).hexdigest() == row.sha256

    samples: dict[str, list[Member]] = {}
    readable = True
    try:
        for member in list_members(tar):
            samples.setdefault(member.key, []).append(member)
    except FormatError as error:
        readable = False
        yield Problem(name, f"{error}; the samples behind it were not checked")
    sample_problems = [*check_samples(dataset, name, tar, samples, expected, readable)]
    yield from sample_problems
    if readable and not is_intact and not sample_problems and len(tar) == row.bytes:
        yield Problem(
            name, "its bytes differ from the table's sha256, in a further member or between members"
        )
    if readable:
        yield from check_index(dataset, row, tar)


def read_file(store: Store, name: str) -> bytes | Problem:
    """Return the content of a file, or the reason why it cannot be read."""
    try:
        return store.read(name)
    except FileNotFoundError:
        return Problem(name, "missing")
    except OSError as error:
        return Problem(name, f"cannot be read ({summarize_error(error)})")


def check_samples(
    dataset: ShardDataset,
    name: str,
    tar: bytes,
    samples: dict[str, list[Member]],
    expected: list[dict[str, Any]],
    readable: bool,
) -> Iterator[Problem]:
    if readable:
        for fields in expected:
            if fields["key"] not in samples:
                yield Problem(f"{name}: {fields['key']}", f"in {SAMPLES} but not in the tar")
    by_key = {fields["key"]: fields for fields in expected}
    for place, (key, members) in enumerate(samples.items()):
        if key not in by_key:
            yield Problem(f"{name}: {key}", f"in the tar but not in {SAMPLES}")
        elif readable or place < len(samples) - 1:  # the last one may be cut short
            fields = by_key[key]
            if fields["index"] != place:
                yield Problem(f"{name}: {key}", f"at place {place}, not {fields['index']}")
            yield from check_sample(dataset, name, tar, members, fields)


def check_sample(
    dataset: ShardDataset, name: str, tar: bytes, members: list[Member], fields: dict[str, Any]
) -> Iterator[Problem]:
    extensions = [member.extension for member in members]
    if extensions[1:3] != [SALIENCY_MEMBER, LABEL_MEMBER] or len(set(extensions)) < len(extensions):
        yield Problem(f"{name}: {fields['key']}", f"has the members {extensions}")
        return
    image, saliency, label = (tar[m.offset : m.offset + m.size] for m in members[:3])
    where = f"{name}: {fields['key']}."
    if extensions[0] not in IMAGE_EXTENSIONS.values():
        yield Problem(where + extensions[0], "not the extension of an image format")
    if hashlib.sha256(image).hexdigest() != fields["image_sha256"]:
        yield Problem(where + extensions[0], "its bytes differ from the table's sha256")
    try:
        side = len(SaliencyMap.from_png(saliency, 0.0, 1.0).grid)
    except ValueError as error:
        yield Problem(where + SALIENCY_MEMBER, str(error))
    else:
        if side != dataset.card.saliency_side:
            yield Problem(where + SALIENCY_MEMBER, f"{side} cells a side, see the card")
    if label != str(fields["label"]).encode():
        yield Problem(where + LABEL_MEMBER, f"is {label!r}, the table says {fields['label']}")


def check_index(dataset: ShardDataset, row: ShardRow, tar: bytes) -> Iterator[Problem]:
    name = shard_name(row.shard, "idx")
    index = read_file(dataset.store, name)
    if isinstance(index, Problem):
        yield index
    elif index != build_index(tar):
        yield Problem(name, "stale: it does not describe its tar")


def check_marker(
    dataset: ShardDataset, row: ShardRow, expected: list[dict[str, Any]]
) -> Iterator[Problem]:
    name = shard_name(row.shard, "parquet")
    try:
        marker = read_marker(dataset.store, row.shard)
    except FileNotFoundError:
        yield Problem(name, "missing")
    except (OSError, UserError) as error:
        yield Problem(name, summarize_error(error))
    else:
        stored = dataset.samples_unchecked.stored
        rows = [{column: fields[column] for column in stored} for fields in expected]
        if marker.row != row or marker.samples.select(stored).to_pylist() != rows:
            yield Problem(name, f"differs from {SHARDS} and {SAMPLES}")
