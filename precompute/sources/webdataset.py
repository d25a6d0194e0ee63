"""Source of existing tar shards; members other than the image are copied to the new shards."""

import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import BinaryIO, cast

from precompute.sources.base import (
    LabeledText,
    PartedSource,
    SourceImage,
    is_pattern,
    key_of,
)
from precompute.sources.labels import LabelError, LabelReader, name_classes
from precompute.sources.tar_members import (
    BLOCK,
    BlockReader,
    TarMember,
    list_members_by_headers,
    list_members_by_index,
)
from schemas.counts import join_first
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.sample import (
    IMAGE_EXTENSIONS,
    LABEL_MEMBER,
    MEMBER_PATTERN,
    OWN_MEMBERS,
    SALIENCY_MEMBER,
    UNLABELED,
)
from schemas.storage import NotAFileError, Store
from schemas.tables import Reject

EXTENSIONS = {*IMAGE_EXTENSIONS.values(), "jpeg", "jpe", "tif", "gif", "ppm", "pgm", "jp2", "avif"}
"""Extensions of images: those that DALI reads, and some that are re-encoded."""
RARE_EXTENSIONS = {"jfif", "pbm", "j2k", "jpx", "tga", "ico", "qoi", "apng", "heic", "heif", "jxl"}
"""Extensions tried if a sample has none of the above; images that cannot be read become rejects."""
SHOWN = 8
RENAMED = "source."
"""Prefix for copied members whose names this project uses itself."""


@dataclass
class Group:
    """The members of one sample.

    Attributes:
        members: (extension, offset in the tar, size) of each member.
        wrong: the problem with a member that is not a regular file; empty if there is none.
        extensions: the extensions of the members.
    """

    members: list[tuple[str, int, int]] = field(default_factory=list)
    wrong: str = ""
    extensions: set[str] = field(default_factory=set)

    def names(self) -> str:
        return join_first([extension for extension, _, _ in self.members], SHOWN)


class WebDatasetShards(PartedSource):
    """Tars in WebDataset format, given by a folder or a glob.

    Members of a sample share the name up to its first dot and need not be adjacent. The image is
    the member with an image's extension; the label is the content of `cls`, as digits or text, or a
    field of `json`. All other members are copied byte for byte, except an older `saliency.png`. A
    key is the tar's name followed by the key in the tar, because keys in WebDataset format are
    unique only within a shard.

    Args:
        image_member: extension of the image, if a sample has several images.
        label_member: extension of the label; `json:FIELD` for a field of a JSON member, `none` for
            a dataset without labels.
        label_text: whether to treat labels as class names even if they are digits.
        keys_with_dots: whether the extension begins at the last dot of a name, not at the first.

    Raises:
        UserError: there are no tars, or one is damaged or compressed.
    """

    def __init__(
        self,
        root: str,
        split: str,
        download: bool,
        image_member: str = "",
        label_member: str = "",
        label_text: bool = False,
        keys_with_dots: bool = False,
    ):
        del split, download
        if not root:
            raise UserError("--root is missing: a folder with tars, or a glob of tars")
        is_glob = is_pattern(root)
        self.store = Store(posixpath.dirname(root) or "." if is_glob else root)
        self.sizes: dict[str, int] = {}
        self.indices: set[str] = set()
        if is_glob:
            self.tars = self.store.glob(root)
        else:
            names = self.store.names("") if self.store.is_folder("") else []
            self.tars = [name for name in names if name.endswith(".tar")]
        if not self.store.is_local:  # one listing replaces a request per tar
            self.find_sizes_and_indices()
        if not self.tars:
            raise UserError(f"{root}: no tars; ROOT is a folder with tars, or a glob of them")
        self.image_member = image_member.lower().lstrip(".")
        self.labels = LabelReader(label_member, label_text)
        self.keys_with_dots = keys_with_dots
        self.classes: list[str] = []
        self.copied_members: set[str] = set()

    def find_sizes_and_indices(self) -> None:
        """Find the sizes of the tars and their indices, with one listing per folder."""
        tars, indices = set(self.tars), set(map(name_index, self.tars))
        for folder in sorted({posixpath.dirname(tar) for tar in self.tars}):
            for name, size in self.store.sizes(folder).items():
                location = posixpath.join(folder, name)
                if location in tars:
                    self.sizes[location] = size
                elif location in indices:
                    self.indices.add(location)

    def parts(self) -> Sequence[str]:
        return self.tars

    def number_labels(self, texts: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        numbers, self.classes, invalid_labels = name_classes(texts, self.labels)
        return numbers, invalid_labels

    def hint(self) -> str:
        names = sorted(self.copied_members)
        if not names:
            return ""
        return f"; they have the members {', '.join(names[:SHOWN])}: --label-member takes a label"

    def list_part(self, part: str) -> Iterator[LabeledText | Reject]:
        """List the samples of a tar by its headers, or by its index if it is in an object store."""
        with self.store.translate_read_errors(part):
            try:
                file = self.open_tar(part)
            except NotAFileError as error:
                yield Reject(part, "not-a-file", str(error))
                return
        try:
            with file:
                members = self.members_of(part, file)
                if isinstance(file, BlockReader):
                    members = self.keep_labels(members, file)
                for key, group in self.groups(members).items():
                    yield self.entry(part, key, group, file)
        except tarfile.TarError as error:
            raise UserError(
                f"{self.store.location(part)}: not a whole, uncompressed tar ({error})"
            ) from error

    def open_tar(self, tar: str) -> BinaryIO | BlockReader:
        if self.store.is_local:
            return self.store.open(tar)
        size = self.sizes[tar] if tar in self.sizes else self.store.size(tar)
        return BlockReader(self.store, tar, size)

    def members_of(self, tar: str, file: BinaryIO | BlockReader) -> Iterator[TarMember]:
        """Yield the members of a tar, except folders. Raises tarfile.TarError."""
        if isinstance(file, BlockReader) and (index := name_index(tar)) in self.indices:
            with self.store.translate_read_errors(index):
                content = self.store.read(index)
            members = list_members_by_index(content, file)
            if members is not None:
                yield from members
                return
        file.seek(0)
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as archive:
            yield from list_members_by_headers(archive, file)

    def keep_labels(self, members: Iterable[TarMember], file: BlockReader) -> Iterator[TarMember]:
        """Yield the members; keep the content of labels in memory while their block is there."""
        for member in members:
            _, extension = self.split_name(posixpath.basename(member.name))
            if self.labels.can_read(extension) and member.size <= BLOCK:
                file.keep(member.offset, member.size)
            yield member

    def split_name(self, name: str) -> tuple[str, str]:
        """Split a member's name into the name of its sample and its extension."""
        stem, dot, extension = name.rpartition(".") if self.keys_with_dots else name.partition(".")
        if not dot or not extension:  # its own group, as a sample may have the same name
            return f"{name} (no extension)", ""
        return stem, extension

    def groups(self, members: Iterable[TarMember]) -> dict[str, Group]:
        """Group the members of a tar by sample, in the order of the samples' first members.

        If a name appears again with an extension that its sample already has, another sample of
        that name begins.
        """
        groups: dict[str, Group] = {}
        current: dict[str, str] = {}
        numbers: dict[str, int] = {}
        for member in members:
            folder, name = posixpath.split(member.name)
            if name.startswith("."):
                continue
            stem, extension = self.split_name(name)
            key = posixpath.join(folder, stem)
            group = groups.setdefault(current.setdefault(key, key), Group())
            if extension in group.extensions:
                number = numbers.get(key, 1) + 1
                while f"{key} ({number})" in groups:
                    number += 1
                numbers[key], current[key] = number, f"{key} ({number})"
                group = groups.setdefault(current[key], Group())
            group.extensions.add(extension)
            group.members.append((extension, member.offset, member.size))
            if member.kind:
                group.wrong = group.wrong or f"its {name} is {member.kind} in the tar"
        return groups

    def entry(
        self, tar: str, key: str, group: Group, file: BinaryIO | BlockReader
    ) -> LabeledText | Reject:
        source = f"{tar}/{key}"
        if group.wrong:
            return Reject(source, "not-a-file", f"{group.wrong}; unpack it and pack the files")
        images = self.candidates(group)
        if not images:
            wanted = f"{self.image_member!r}" if self.image_member else "an image"
            return Reject(source, "no-image", f"none of its members is {wanted}: {group.names()}")
        if len(images) > 1:
            names = Group(images).names()
            detail = f"choose one by --image-member, of {names}; its members: {group.names()}"
            if any("." in name for name, _, _ in images):
                detail += "; or keys have dots: --keys-with-dots"
            return Reject(source, "several-images", detail)
        image = images[0]
        try:
            label, label_name = self.labels.read(group.members, file)
        except LabelError as error:
            return Reject(source, "bad-label", str(error))
        carried: dict[str, tuple[str, int, int]] = {}
        for name, offset, size in group.members:
            if name in (image[0], SALIENCY_MEMBER) or (name == LABEL_MEMBER == label_name):
                continue
            own = f"{RENAMED}{name}" if name in OWN_MEMBERS else name
            if not MEMBER_PATTERN.fullmatch(own) or own in carried:
                detail = f"{name!r} cannot be the name of a member here"
                return Reject(source, "bad-member", detail)
            carried[own] = (own, offset, size)
            self.copied_members.add(name)
        name = key_of(f"{tar.removesuffix('.tar')}/{key}.image")
        annotation = json.dumps([image, *carried.values()])
        return LabeledText(SourceImage(name, source, UNLABELED, annotation), label)

    def candidates(self, group: Group) -> list[tuple[str, int, int]]:
        """Return the members that may be the image, by the option or by their extension.

        A simple extension (`jpg`) takes precedence over compound ones (`input.jpg`).
        """
        if self.image_member:
            return [m for m in group.members if m[0].lower() == self.image_member]
        members = [m for m in group.members if m[0] != SALIENCY_MEMBER]
        return (
            [m for m in members if m[0].lower() in EXTENSIONS]
            or [m for m in members if m[0].lower().rpartition(".")[2] in EXTENSIONS]
            or [m for m in members if m[0].lower().rpartition(".")[2] in RARE_EXTENSIONS]
        )

    def read(self, image: SourceImage) -> bytes:
        [(_, content)] = self.contents(image, slice(0, 1))
        return content

    def members(self, image: SourceImage) -> dict[str, bytes]:
        return dict(self.contents(image, slice(1, None)))

    def contents(self, image: SourceImage, chosen: slice) -> Iterator[tuple[str, bytes]]:
        """Read the chosen files of a sample: the image comes first, then its other members."""
        tar = self.tar_of(image.location)
        for extension, offset, size in json.loads(image.annotation)[chosen]:
            content = self.store.read(tar, offset, offset + size) if size else b""
            if len(content) != size:
                raise OSError(f"{to_stored(tar)} has become shorter than it was when listed")
            yield extension, content

    def tar_of(self, location: str) -> str:
        """Return the tar that a location begins with; folders may be named like tars too."""
        parts = location.split("/")
        heads = ("/".join(parts[:count]) for count in range(1, len(parts)))
        return next(head for head in heads if head in self.tar_names)

    @cached_property
    def tar_names(self) -> frozenset[str]:
        return frozenset(self.tars)


def name_index(tar: str) -> str:
    """Return the name of the DALI index that belongs to a tar."""
    return f"{tar.removesuffix('.tar')}.idx"
