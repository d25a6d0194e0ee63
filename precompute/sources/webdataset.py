"""Existing tar shards: saliency is added, and what else a sample has is carried over."""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from precompute.sources.base import Source, SourceImage, is_pattern, key_of
from precompute.sources.labels import LabelError, LabelReader, name_classes
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.sample import (
    IMAGE_EXTENSIONS,
    LABEL_MEMBER,
    MEMBER_PATTERN,
    OWN_MEMBERS,
    SALIENCY_MEMBER,
)
from schemas.storage import NotAFileError, Store
from schemas.tables import Reject

EXTENSIONS = {*IMAGE_EXTENSIONS.values(), "jpeg", "jpe", "tif", "gif", "ppm", "pgm", "jp2", "avif"}
"""Of images: those that DALI reads, and some that are re-encoded."""
RARE_EXTENSIONS = {"jfif", "pbm", "j2k", "jpx", "tga", "ico", "qoi", "apng", "heic", "heif", "jxl"}
"""Looked for where a sample has none of the others; what is not read is a reject that says why."""
SHOWN = 8
RENAMED = "source."
"""Put before a carried member that would be taken for one of this project's own."""


@dataclass
class Group:
    """The members of one sample: (extension, offset in the tar, size), and what is wrong."""

    members: list[tuple[str, int, int]] = field(default_factory=list)
    wrong: str = ""

    def names(self) -> str:
        names = [extension for extension, _, _ in self.members]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(names[:SHOWN]) + more


class WebDatasetShards(Source):
    """Tars by a folder or a glob, as `webdataset` writes them.

    Members of a sample share the name up to its first dot; they need not lie side by side. The
    image is the member with an image's extension, the label what `cls` says as digits or text, or
    a field of `json`. Everything else is carried over byte for byte, but for an older
    `saliency.png`. Keys are those of the tars behind the tar's name, because webdataset asks for
    unique keys in a shard only.

    Args:
        image_member: extension of the image, where a sample has several.
        label_member: extension of the label; `json:FIELD` for a field of a JSON member, `none` for
            a dataset without labels.
        label_text: take labels for names of classes even where they are digits.
        keys_with_dots: the extension begins at the last dot of a name, not at the first.

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
        if is_glob:
            self.tars = self.store.glob(root)
        else:
            there = self.store.names("") if self.store.is_folder("") else []
            self.tars = [name for name in there if name.endswith(".tar")]
        if not self.tars:
            raise UserError(f"{root}: no tars; ROOT is a folder with tars, or a glob of them")
        self.image_member = image_member.lower().lstrip(".")
        self.labels = LabelReader(label_member, label_text)
        self.keys_with_dots = keys_with_dots
        self.classes: list[str] = []
        self.others: set[str] = set()

    def images(self) -> Iterator[SourceImage | Reject]:
        """List all samples; labels get their numbers once all of them are known."""
        entries: list[tuple[SourceImage, str]] = []
        for tar in self.tars:
            for entry in self.list_tar(tar):
                if isinstance(entry, Reject):
                    yield entry
                else:
                    entries.append(entry)
        numbers, self.classes, bad = name_classes({label for _, label in entries}, self.labels)
        for image, label in entries:
            if label in bad:
                yield Reject(image.location, "bad-label", bad[label])
            else:
                yield image._replace(label=numbers[label])

    def hint(self) -> str:
        names = sorted(self.others)
        if not names:
            return ""
        return f"; they have the members {', '.join(names[:SHOWN])}: --label-member takes a label"

    def list_tar(self, tar: str) -> Iterator[tuple[SourceImage, str] | Reject]:
        try:
            file = self.store.open(tar)
        except NotAFileError as error:
            yield Reject(tar, "not-a-file", str(error))
            return
        try:
            with file, tarfile.open(fileobj=file, mode="r:") as archive:
                for key, group in self.groups(archive).items():
                    yield self.entry(tar, key, group, archive)
        except tarfile.TarError as error:
            raise UserError(
                f"{self.store.location(tar)}: not a whole, uncompressed tar ({error})"
            ) from error

    def groups(self, archive: tarfile.TarFile) -> dict[str, Group]:
        """Gather the members of every sample of a tar, in the order of their first members.

        A name that comes again with a member that it had already is another sample of that name.
        """
        groups: dict[str, Group] = {}
        current: dict[str, str] = {}
        for info in archive:
            folder, name = posixpath.split(info.name)
            stem, dot, extension = (
                name.rpartition(".") if self.keys_with_dots else name.partition(".")
            )
            if info.isdir() or name.startswith("."):
                continue
            if not dot or not extension:  # no sample's; a sample may bear its name
                stem, extension = f"{name} (no extension)", ""
            key = posixpath.join(folder, stem)
            group = groups.setdefault(current.setdefault(key, key), Group())
            if any(extension == there for there, _, _ in group.members):
                again = (
                    sum(1 for other in groups if other == key or other.startswith(f"{key} (")) + 1
                )
                current[key] = f"{key} ({again})"
                group = groups.setdefault(current[key], Group())
            group.members.append((extension, info.offset_data, info.size))
            if not info.isreg() or info.issparse():
                kind = "a link" if info.islnk() or info.issym() else "no plain file"
                group.wrong = group.wrong or f"its {name} is {kind} in the tar"
        return groups

    def entry(
        self, tar: str, key: str, group: Group, archive: tarfile.TarFile
    ) -> tuple[SourceImage, str] | Reject:
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
            label, label_name = self.labels.read(group.members, archive.fileobj)
        except LabelError as error:
            return Reject(source, "bad-label", str(error))
        carried: list[tuple[str, int, int]] = []
        for name, offset, size in group.members:
            if name in (image[0], SALIENCY_MEMBER) or (name == LABEL_MEMBER == label_name):
                continue
            own = f"{RENAMED}{name}" if name in OWN_MEMBERS else name
            if not MEMBER_PATTERN.fullmatch(own) or own in (there for there, _, _ in carried):
                detail = f"{name!r} cannot stand beside an image here"
                return Reject(source, "bad-member", detail)
            carried.append((own, offset, size))
            self.others.add(name)
        name = key_of(f"{tar.removesuffix('.tar')}/{key}.image")
        return SourceImage(name, source, 0, json.dumps([image, *carried])), label

    def candidates(self, group: Group) -> list[tuple[str, int, int]]:
        """Return the members that may be the image: by the option, or by their extension.

        One whose whole extension is an image's (`jpg`) goes before compound ones (`input.jpg`).
        """
        if self.image_member:
            return [m for m in group.members if m[0].lower() == self.image_member]
        others = [m for m in group.members if m[0] != SALIENCY_MEMBER]
        return (
            [m for m in others if m[0].lower() in EXTENSIONS]
            or [m for m in others if m[0].lower().rpartition(".")[2] in EXTENSIONS]
            or [m for m in others if m[0].lower().rpartition(".")[2] in RARE_EXTENSIONS]
        )

    def read(self, image: SourceImage) -> bytes:
        return next(self.contents(image))[1]

    def members(self, image: SourceImage) -> dict[str, bytes]:
        _, *carried = self.contents(image)
        return dict(carried)

    def contents(self, image: SourceImage) -> Iterator[tuple[str, bytes]]:
        tar = self.tar_of(image.location)
        for extension, offset, size in json.loads(image.annotation):
            content = self.store.read(tar, offset, offset + size) if size else b""
            if len(content) != size:
                raise OSError(f"{to_stored(tar)} has become shorter than it was when listed")
            yield extension, content

    def tar_of(self, location: str) -> str:
        """Return the tar that a location begins with; a folder may bear a tar's name too."""
        tars = set(self.tars)
        parts = location.split("/")
        heads = ("/".join(parts[:count]) for count in range(1, len(parts)))
        return next(head for head in heads if head in tars)
