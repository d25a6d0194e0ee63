"""Shards in a DALI graph: checked, read and decoded."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor

from pipeline import failures
from pipeline.cache import Cache
from schemas import ShardDataset, ShardRow, UserError
from schemas.sample import IMAGE_EXTENSIONS, LABEL_MEMBER, SALIENCY_MEMBER
from schemas.shard import INDEX_VERSION
from schemas.storage import Store
from schemas.tables import shard_name

PROTOCOLS = ("", "file", "s3", "gs")
"""Where DALI's WebDataset reader reads from (2.4: s3 and, experimentally, gs)."""

CHECKS_AT_A_TIME = 16
"""Shards checked at a time on opening: enough to hide an object store's latency."""


@dataclass(frozen=True)
class Shards:
    """The shards of a dataset that hold samples.

    Attributes:
        tars, indices: locations that DALI opens, in one order.
        samples: how many samples they hold in all.
        digest: of the dataset's shard table.
        url: the dataset's folder.
    """

    tars: tuple[str, ...]
    indices: tuple[str, ...]
    samples: int
    digest: str
    url: str

    def in_order(self, order: list[int]) -> "Shards":
        """The same shards, the one that `order` names first at the front."""
        return replace(
            self,
            tars=tuple(self.tars[place] for place in order),
            indices=tuple(self.indices[place] for place in order),
        )


def open_shards(url: str | Path, cache: Cache | None = None) -> Shards:
    """Open a dataset for DALI and check every index: DALI reads a stale one without a word.

    Args:
        cache: where the dataset is copied to first; needed where DALI cannot read itself, and of
            use where a network is slower than training.

    Raises:
        UserError: no dataset there, DALI cannot read from there, or a shard's tar or index is not
            what the tables say; the message names the shard.
    """
    dataset = ShardDataset.open(url)
    protocol = urlsplit(dataset.url).scheme
    if cache is None and protocol not in PROTOCOLS:
        raise UserError(
            f"{dataset.url}: DALI does not read from {protocol}://; give a cache, or copy the "
            "dataset to a local folder"
        )
    if cache is not None:
        raise UserError("the cache is not plugged into this reader")
    store = dataset.store
    held = [row for row in dataset.shards if row.samples]
    with ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
        list(pool.map(lambda row: check_shard(store, row), held))
    return Shards(
        tars=tuple(store.location(shard_name(row.shard, "tar")) for row in held),
        indices=tuple(store.location(shard_name(row.shard, "idx")) for row in held),
        samples=sum(row.samples for row in held),
        digest=dataset.digest,
        url=dataset.url,
    )


def check_shard(store: Store, row: ShardRow) -> None:
    """Raises UserError unless tar, index and table agree on sizes and the number of samples."""
    tar, index = shard_name(row.shard, "tar"), shard_name(row.shard, "idx")
    try:
        size = store.size(tar)
        lines = store.read(index).decode("ascii").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{store.url}: shard {row.shard}: {error.args[-1]} is missing") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{store.location(index)}: not an index") from error
    problem = index_problem(lines, row, size)
    if problem:
        raise UserError(
            f"{store.location(index)}: shard {row.shard}: {problem}; "
            "`python -m schemas verify` shows all that is wrong with the dataset"
        )


def index_problem(lines: list[str], row: ShardRow, size: int) -> str:
    """What is wrong with a shard of `size` bytes and its index's lines; "" if nothing is."""
    if size != row.bytes:
        return f"the tar beside it has {size} bytes, the table says {row.bytes}"
    head = lines[0].split() if lines else []
    if head != [INDEX_VERSION, str(row.samples)]:
        return f"its first line is {' '.join(head)!r}, not '{INDEX_VERSION} {row.samples}'"
    if len(lines) - 1 != row.samples:
        return f"{len(lines) - 1} samples are listed, the table says {row.samples}"
    if row.samples:
        try:
            *_, offset, length, _ = lines[-1].split()
            end = int(offset) + int(length)
        except ValueError:
            return f"its last line is {lines[-1]!r}"
        if end > size:
            return f"its last member ends at byte {end}, the tar at {size}"
    return ""


@dataclass(frozen=True)
class Encoded:
    """A sample in the graph, as bytes; label and source (tar:offset:name) are padded with zeros."""

    image: Any
    saliency: Any
    label: Any
    source: Any


def read(shards: Shards, rank: int, world_size: int, **options: Any) -> Encoded:
    """In the graph: this rank's share of the samples, as bytes."""
    image, saliency, label = fn.readers.webdataset(  # type: ignore[misc]
        paths=list(shards.tars),
        index_paths=list(shards.indices),
        ext=[";".join(dict.fromkeys(IMAGE_EXTENSIONS.values())), SALIENCY_MEMBER, LABEL_MEMBER],
        missing_component_behavior="error",
        # a shard that is cut while it is mapped would end the process by a bus error
        dont_use_mmap=True,
        shard_id=rank,
        num_shards=world_size,
        **options,
    )
    source = fn.get_property(image, key="source_info")
    return Encoded(image, saliency, fn.pad(label), fn.pad(source))


def decode(encoded: Any, device: torch.device, output_type: Any = types.RGB) -> Any:
    """In the graph: bytes -> uint8 HWC on the device, with EXIF orientation applied."""
    decoder = "mixed" if device.type == "cuda" else "cpu"
    return fn.decoders.image(encoded, device=decoder, output_type=output_type)


def run(pipeline: Pipeline, device: torch.device, shards: Shards) -> list[Any]:
    """The next batch's outputs, ready for what PyTorch's current stream does next.

    Raises:
        UserError: a shard or sample cannot be read or decoded; it names it.
    """
    with failures.explained(shards.url, shards.tars):
        if device.type == "cpu":
            return list(pipeline.run())
        return list(pipeline.run(torch.cuda.current_stream(device)))


def tensor(output: Any) -> Tensor:
    """A uniform output of the graph as a tensor, without a copy."""
    return torch.from_dlpack(output.as_tensor())


def tensors(output: Any) -> list[Tensor]:
    """An output of the graph whose samples differ in shape, without a copy."""
    return [torch.from_dlpack(sample) for sample in output]


def parse_labels(ascii_digits: Tensor) -> Tensor:
    """(N, L) uint8 ASCII such as "17" or "-1", padded with zeros -> (N,) int64."""
    value = torch.zeros(len(ascii_digits), dtype=torch.int64)
    for column in ascii_digits.long().unbind(1):
        digit = column - ord("0")
        value = torch.where((digit >= 0) & (digit <= 9), 10 * value + digit, value)
    return torch.where(ascii_digits[:, 0] == ord("-"), -value, value)


def parse_keys(sources: Tensor) -> list[str]:
    """(N, L) uint8 of "tar:offset:KEY.extension", padded with zeros -> N keys."""
    names = [bytes(row).rstrip(b"\0").decode() for row in sources.numpy()]
    return [name.rsplit(":", 1)[-1].split(".", 1)[0] for name in names]


def threads() -> int:
    """DALI's CPU threads: the cores of this process, shared with torchrun's other ranks here."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def derived_seed(*parts: str | int) -> int:
    """A seed in 0 .. 2^31 - 1 that depends on every part."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
