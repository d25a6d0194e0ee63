"""A dataset of shards: open it, iterate over it, verify it."""

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.counts import format_count
from schemas.errors import FormatError, UserError
from schemas.saliency import SaliencyMap
from schemas.sample import LABEL_MEMBER, SALIENCY_MEMBER, Sample
from schemas.sample_table import SampleTable
from schemas.shard import Member, list_members
from schemas.storage import Store
from schemas.tables import (
    CARD,
    REJECTS,
    REJECTS_SCHEMA,
    SAMPLES,
    SHARD_FOLDER,
    SHARDS,
    SHARDS_SCHEMA,
    DatasetCard,
    ShardRow,
    read_table,
    shard_name,
)
from schemas.verify import VerifyOptions, VerifyReport, verify_dataset

UNNAMED = ("folder", "files", "webdataset")
"""Names of datasets that were given none: those of kinds of sources."""

COMPLETION_ADVICE = "run the same precompute command again to complete it"


class ShardDataset:
    """Images with their saliency maps, in WebDataset shards. Needs neither torch nor DALI nor Ray.

    Iterating yields one `Sample` at a time, in the order on disk (shuffled once, when written).

    Attributes:
        card: description of the dataset and of how it was made.
        shards: one `ShardRow` per shard, in order.
    """

    def __init__(self, store: Store, card: DatasetCard, shards: list[ShardRow]):
        self.store = store
        self.card = card
        self.shards = shards

    @classmethod
    def open(cls, url: str | Path) -> "ShardDataset":
        """Open a dataset by its folder: a plain path or any fsspec URL.

        Raises:
            UserError: nothing is there, or the job that writes or extends the dataset has not
                finished.
            FormatError: the dataset has another format version, or its card or table is damaged.
        """
        dataset = cls.open_unchecked(url)
        card, shards = dataset.card, dataset.shards
        samples = sum(row.samples for row in shards)
        if (card.shards, card.samples) != (len(shards), samples):
            raise UserError(
                f"{dataset.url}: not finished: its {CARD} counts "
                f"{format_count(card.samples, 'sample')} in {format_count(card.shards, 'shard')}, "
                f"{SHARDS} {samples} in {len(shards)}; {COMPLETION_ADVICE}"
            )
        return dataset

    @classmethod
    def open_unchecked(cls, url: str | Path) -> "ShardDataset":
        """Open a dataset as `open` does, even if its card and its table of shards disagree.

        `verify` reports the difference. It is left by an extension that was interrupted before it
        wrote the card.

        Raises:
            UserError, FormatError: see `open`.
        """
        store = Store(url)
        try:
            card = read_card(store)
        except FileNotFoundError as error:
            if store.sizes(SHARD_FOLDER):
                raise UserError(
                    f"{store.url}: not finished: it has shards but no {CARD}; {COMPLETION_ADVICE}"
                ) from error
            raise UserError(
                f"{store.url}: no dataset here (no {CARD}); write one with `saliency-precompute`"
            ) from error
        table = read_table(store, SHARDS, SHARDS_SCHEMA)
        return cls(store, card, [ShardRow(**row) for row in table.to_pylist()])

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def name(self) -> str:
        """Name of the dataset, from its card."""
        return self.card.name

    @property
    def title(self) -> str:
        """The dataset's name, or its folder's if the name only says what kind of source it had."""
        return posixpath.basename(self.url.rstrip("/")) if self.name in UNNAMED else self.name

    @property
    def classes(self) -> list[str]:
        """Class names by label; empty when nothing is labeled."""
        return self.card.classes

    @property
    def shard_urls(self) -> list[str]:
        """Locations of the tars in order: plain paths for a local dataset, otherwise URLs."""
        return [self.store.location(shard_name(row.shard, "tar")) for row in self.shards]

    @property
    def index_urls(self) -> list[str]:
        """Locations of the DALI index files, in the order of `shard_urls`."""
        return [self.store.location(shard_name(row.shard, "idx")) for row in self.shards]

    @cached_property
    def samples(self) -> SampleTable:
        """Table with one row per sample, in the order on disk; each column is read when it is
        needed.

        Raises:
            FormatError: samples.parquet is missing, damaged or of another format.
            UserError: an extension was interrupted after it wrote samples.parquet.
        """
        if len(self.samples_unchecked) != self.card.samples:
            raise UserError(
                f"{self.url}: not finished: its {CARD} counts "
                f"{format_count(self.card.samples, 'sample')}, {SAMPLES} "
                f"{len(self.samples_unchecked)}; {COMPLETION_ADVICE}"
            )
        return self.samples_unchecked

    @cached_property
    def samples_unchecked(self) -> SampleTable:
        """The same table, even if its length and the card disagree (`open_unchecked`).

        Raises:
            FormatError: see `samples`.
        """
        return SampleTable(self.store, self.card.samples, self.shards)

    @cached_property
    def unlabeled(self) -> int:
        """Number of samples without a label, counted one part of the table at a time."""
        labels = (batch.column(0) for batch in self.samples.batches(["label"]))
        return sum(pc.sum(pc.less(column, 0)).as_py() or 0 for column in labels)

    @cached_property
    def rejects(self) -> pa.Table:
        """Table of rejects.parquet: one row for every input that was not written."""
        return read_table(self.store, REJECTS, REJECTS_SCHEMA)

    @cached_property
    def digest(self) -> str:
        """sha256 over the sha256 of all shards: equal for equal bytes, wherever they are stored."""
        return hashlib.sha256(json.dumps([list(row) for row in self.shards]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.card.samples

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples.

        Only `verify` compares the bytes of images with their sha256.

        Raises:
            FormatError: a shard does not match the tables: it is missing or cut short, it has other
                samples or labels, or a map is damaged.
        """
        start = 0
        for row in self.shards:
            yield from self._read_shard(row, self.samples.rows(start, start + row.samples))
            start += row.samples

    def verify(
        self,
        workers: int = 4,
        progress: Callable[[int], None] | None = None,
        *,
        shards: int | None = None,
        record: Path | None = None,
    ) -> VerifyReport:
        """Compare every byte with the tables.

        Args:
            workers: number of shards read in parallel; each is held in memory as a whole.
            progress: called after each shard with its number of samples.
            shards: number of shards to verify, drawn at random; by default all of them.
            record: file that records the verified shards, so that an interrupted verification can
                resume.

        Raises:
            UserError: the record belongs to another dataset.
        """
        return verify_dataset(self, VerifyOptions(workers, shards, record=record), progress)

    def _read_shard(self, row: ShardRow, table: pa.Table) -> Iterator[Sample]:
        name = shard_name(row.shard, "tar")
        location = self.store.location(name)
        advice = f"`saliency-shards verify {self.url}` lists all that is wrong"
        try:
            with self.store.translate_read_errors(name):
                tar = self.store.read(name)
            bundles = bundle(list_members(tar))
        except FileNotFoundError as error:
            raise FormatError(f"{location}: missing; {advice}") from error
        except FormatError as error:
            raise FormatError(f"{location}: {error}; {advice}") from error
        if [key for key, _ in bundles] != table["key"].to_pylist():
            raise FormatError(f"{location}: other samples than in {SAMPLES}; {advice}")
        for (key, members), fields in zip(bundles, table.to_pylist(), strict=True):
            content = {m.extension: tar[m.offset : m.offset + m.size] for m in members}
            try:
                sample = build_sample(content, fields)
            except ValueError as error:
                raise FormatError(f"{location}: sample {key}: {error}; {advice}") from error
            yield sample


def build_sample(content: dict[str, bytes], fields: dict[str, Any]) -> Sample:
    """Build a sample from its members and its row of the table of samples.

    Raises:
        ValueError: the map is damaged, the label is not that of the row, or the row has values that
            no sample can have.
    """
    label = content[LABEL_MEMBER]
    if label != str(fields["label"]).encode():
        raise ValueError(f"its label is {label!r}, {SAMPLES} says {fields['label']}")
    image, *_ = content
    saliency = SaliencyMap.from_png(
        content[SALIENCY_MEMBER], fields["saliency_min"], fields["saliency_max"]
    )
    return Sample(
        key=fields["key"],
        image=content[image],
        extension=image,
        saliency=saliency.values(),
        label=fields["label"],
        height=fields["height"],
        width=fields["width"],
        source=fields["source"],
        reencoded=fields["reencoded"],
        members={name: content[name] for name in list(content)[3:]},
    )


def read_card(store: Store) -> DatasetCard:
    """Read the card of a dataset. Raises FileNotFoundError, UserError."""
    with store.translate_read_errors(CARD):
        content = store.read(CARD)
    return DatasetCard.from_json(content, store.location(CARD))


def bundle(members: Iterator[Member]) -> list[tuple[str, list[Member]]]:
    """Group consecutive members that share a key into samples.

    Raises:
        FormatError: a sample does not begin with an image, a map and a label, in this order.
    """
    samples: list[tuple[str, list[Member]]] = []
    for member in members:
        if not samples or samples[-1][0] != member.key:
            samples.append((member.key, []))
        samples[-1][1].append(member)
    for key, group in samples:
        extensions = [m.extension for m in group]
        is_repeated = len(set(extensions)) < len(extensions)
        if extensions[1:3] != [SALIENCY_MEMBER, LABEL_MEMBER] or is_repeated:
            raise FormatError(f"sample {key} has the members {extensions}")
    return samples
