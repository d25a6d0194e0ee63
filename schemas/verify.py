"""Every byte of a dataset against its tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from schemas.errors import FormatError
from schemas.saliency import SaliencyMap
from schemas.sample import IMAGE_EXTENSIONS, LABEL_MEMBER, SALIENCY_MEMBER
from schemas.shard import Member, index_of, members_of, read_marker
from schemas.tables import CARD, SAMPLES, SHARD_FOLDER, SHARDS, ShardRow, shard_name

if TYPE_CHECKING:
    from schemas.dataset import ShardDataset

SHOWN = 20


class Problem(NamedTuple):
    """`where`: a file, or a sample in a file. `what`: what is wrong with it."""

    where: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """What was read, and every problem found in it."""

    url: str
    shards: int
    samples: int
    bytes: int
    problems: list[Problem]

    @property
    def clean(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        read = f"{self.samples} samples, {self.shards} shards, {self.bytes / 1e6:.1f} MB read"
        if self.clean:
            return f"{self.url}: clean: {read}"
        lines = [f"  {problem.where}: {problem.what}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        return "\n".join([f"{self.url}: {len(self.problems)} problems: {read}", *lines])


def verify_dataset(
    dataset: ShardDataset, workers: int, progress: Callable[[int], None] | None
) -> VerifyReport:
    """See `ShardDataset.verify`."""
    problems = list(check_tables(dataset))
    by_shard = rows_by_shard(dataset.samples)

    def check(row: ShardRow) -> list[Problem]:
        return list(check_shard(dataset, row, by_shard.get(row.shard, [])))

    with ThreadPoolExecutor(workers) as pool:
        for row, found in zip(dataset.shards, pool.map(check, dataset.shards), strict=True):
            problems += found
            if progress:
                progress(row.samples)
    total = sum(row.bytes for row in dataset.shards)
    return VerifyReport(dataset.url, len(dataset.shards), len(dataset.samples), total, problems)


def rows_by_shard(samples: pa.Table) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in samples.to_pylist():
        rows.setdefault(row["shard"], []).append(row)
    return rows


def check_tables(dataset: ShardDataset) -> Iterator[Problem]:
    """The card, the tables and the listing of the folder against each other."""
    card, samples = dataset.card, dataset.samples
    if card.samples != len(samples):
        yield Problem(CARD, f"counts {card.samples} samples, {SAMPLES} has {len(samples)}")
    if card.shards != len(dataset.shards):
        yield Problem(CARD, f"counts {card.shards} shards, {SHARDS} has {len(dataset.shards)}")
    if card.rejects != len(dataset.rejects):
        yield Problem(CARD, f"counts {card.rejects} rejects, the table has {len(dataset.rejects)}")
    known = {row.shard for row in dataset.shards}
    if unknown := set(samples["shard"].to_pylist()) - known:
        yield Problem(SAMPLES, f"has samples of shards {sorted(unknown)}, which {SHARDS} lacks")
    keys = samples["key"].to_pylist()
    for key in sorted(key for key, count in Counter(keys).items() if count > 1):
        yield Problem(SAMPLES, f"has the key {key} more than once")
    labels = {label for label in samples["label"].to_pylist() if label >= len(card.classes)}
    if labels:
        yield Problem(SAMPLES, f"has labels {sorted(labels)} of {len(card.classes)} classes")
    expected = {
        shard_name(shard, suffix) for shard in known for suffix in ("tar", "idx", "parquet")
    }
    for file in dataset.store.sizes(SHARD_FOLDER):
        if f"{SHARD_FOLDER}/{file}" not in expected:
            yield Problem(f"{SHARD_FOLDER}/{file}", f"not a file of any shard in {SHARDS}")


def check_shard(
    dataset: ShardDataset, row: ShardRow, expected: list[dict[str, Any]]
) -> Iterator[Problem]:
    """One shard's tar, index and marker against the tables."""
    store, name = dataset.store, shard_name(row.shard, "tar")
    if row.samples != len(expected):
        yield Problem(SHARDS, f"{name} has {row.samples} samples, {SAMPLES} {len(expected)}")
    yield from check_marker(dataset, row, expected)
    try:
        tar = store.read(name)
    except FileNotFoundError:
        yield Problem(name, "missing")
        return
    if len(tar) != row.bytes:
        yield Problem(name, f"has {len(tar)} bytes, the table says {row.bytes}")
    whole = hashlib.sha256(tar).hexdigest() == row.sha256

    samples: dict[str, list[Member]] = {}
    readable = True
    try:
        for member in members_of(tar):
            samples.setdefault(member.key, []).append(member)
    except FormatError as error:
        readable = False
        yield Problem(name, f"{error}; the samples behind it were not checked")
    found = [*check_samples(dataset, name, tar, samples, expected, readable)]
    yield from found
    if readable and not whole and not found and len(tar) == row.bytes:
        yield Problem(
            name, "its bytes differ from the table's sha256, in a further member or between members"
        )
    if readable:
        yield from check_index(dataset, row, tar)


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
        elif readable or place < len(samples) - 1:  # the last one may be cut in the middle
            fields = by_key[key]
            if fields["index"] != place:
                yield Problem(f"{name}: {key}", f"at place {place}, not {fields['index']}")
            yield from check_sample(dataset, name, tar, members, fields)


def check_sample(
    dataset: ShardDataset, name: str, tar: bytes, members: list[Member], fields: dict[str, Any]
) -> Iterator[Problem]:
    found = [member.extension for member in members]
    if found[1:3] != [SALIENCY_MEMBER, LABEL_MEMBER] or len(set(found)) < len(found):
        yield Problem(f"{name}: {fields['key']}", f"has the members {found}")
        return
    image, saliency, label = (tar[m.offset : m.offset + m.size] for m in members[:3])
    where = f"{name}: {fields['key']}."
    if found[0] not in IMAGE_EXTENSIONS.values():
        yield Problem(where + found[0], "not the extension of an image format")
    if hashlib.sha256(image).hexdigest() != fields["image_sha256"]:
        yield Problem(where + found[0], "its bytes differ from the table's sha256")
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
    try:
        index = dataset.store.read(name)
    except FileNotFoundError:
        yield Problem(name, "missing")
        return
    if index != index_of(tar):
        yield Problem(name, "stale: it does not describe the tar beside it")


def check_marker(
    dataset: ShardDataset, row: ShardRow, expected: list[dict[str, Any]]
) -> Iterator[Problem]:
    name = shard_name(row.shard, "parquet")
    try:
        marker = read_marker(dataset.store, row.shard)
    except FileNotFoundError:
        yield Problem(name, "missing")
    except FormatError as error:
        yield Problem(name, str(error))
    else:
        if marker.row != row or marker.samples.to_pylist() != expected:
            yield Problem(name, f"says otherwise than {SHARDS} and {SAMPLES}")
