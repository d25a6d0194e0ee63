"""Existing tar shards: saliency is added, and what else a sample has is carried over."""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator

from precompute.sources.base import Source, SourceImage, key_of
from schemas.errors import UserError
from schemas.sample import (
    IMAGE_EXTENSIONS,
    LABEL_MEMBER,
    MEMBER_PATTERN,
    OWN_MEMBERS,
    SALIENCY_MEMBER,
    UNLABELLED,
)
from schemas.storage import Store
from schemas.tables import Reject

# beside the extensions that DALI reads: those of images that are re-encoded
EXTENSIONS = {*IMAGE_EXTENSIONS.values(), "jpeg", "jpe", "tif", "gif", "ppm", "pgm", "jp2", "avif"}
LABEL = re.compile(rb"-1|\d{1,9}")

# the members of one sample: (extension, offset in the tar, size)
Members = list[tuple[str, int, int]]


class WebDatasetShards(Source):
    """Tars by a folder or a glob, each sample's files side by side, as `webdataset` writes them.

    The image is the first member with an image's extension; `cls` holds the label as digits.
    Everything else is carried over byte for byte, but for an older `saliency.png`. Keys are those
    of the tars behind the tar's name, because webdataset asks for unique keys in a shard only.
    """

    def __init__(self, root: str, split: str, download: bool):
        del split, download
        if not root:
            raise UserError("--root is missing: a folder with tars, or a glob of tars")
        is_glob = any(sign in root for sign in "*?[")
        self.store = Store(posixpath.dirname(root) or "." if is_glob else root)
        self.tars = self.store.glob(root if is_glob else f"{self.store.url}/*.tar")
        if not self.tars:
            raise UserError(f"{root}: no tars; ROOT is a folder with tars, or a glob of them")
        self.most = UNLABELLED

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """The digits: tars know no names. Complete once all images are listed."""
        return [str(label) for label in range(self.most + 1)]

    def images(self) -> Iterator[SourceImage | Reject]:
        for tar in self.tars:
            with self.store.open(tar) as file:
                try:
                    with tarfile.open(fileobj=file, mode="r:") as archive:
                        for key, members, label in samples(archive):
                            yield self.entry(tar, key, members, label)
                except tarfile.TarError as error:
                    raise UserError(
                        f"{self.store.location(tar)}: not a whole, uncompressed tar ({error})"
                    ) from error

    def entry(self, tar: str, key: str, members: Members, label: bytes) -> SourceImage | Reject:
        source = f"{tar}/{key}"
        image = next((m for m in members if m[0].lower() in EXTENSIONS), None)
        if image is None:
            names = ", ".join(extension for extension, _, _ in members)
            return Reject(source, "no-image", f"none of its members is an image: {names}")
        if not LABEL.fullmatch(label):
            return Reject(source, "bad-label", f"its {LABEL_MEMBER} is {label[:20]!r}, not digits")
        carried = [
            m for m in members if m is not image and m[0] not in (SALIENCY_MEMBER, LABEL_MEMBER)
        ]
        for name, _, _ in carried:
            if name in OWN_MEMBERS or not MEMBER_PATTERN.fullmatch(name):
                return Reject(source, "bad-member", f"{name!r} cannot stand beside an image here")
        self.most = max(self.most, int(label))
        name = key_of(f"{tar.removesuffix('.tar')}/{key}.image")
        return SourceImage(name, source, int(label), json.dumps([image, *carried]))

    def read(self, image: SourceImage) -> bytes:
        return next(self.contents(image))[1]

    def members(self, image: SourceImage) -> dict[str, bytes]:
        _, *carried = self.contents(image)
        return dict(carried)

    def contents(self, image: SourceImage) -> Iterator[tuple[str, bytes]]:
        tar, _, _ = image.location.partition(".tar/")
        for extension, offset, size in json.loads(image.annotation):
            yield extension, self.store.read(f"{tar}.tar", offset, offset + size)


def samples(archive: tarfile.TarFile) -> Iterator[tuple[str, Members, bytes]]:
    """Key, members and label (`-1` without one) of members in a row that share a key."""
    current, members, label = "", Members(), b"-1"
    for info in archive:
        folder, name = posixpath.split(info.name)
        stem, _, extension = name.partition(".")
        if not info.isfile() or not stem or not extension:
            continue
        key = posixpath.join(folder, stem)
        if members and key != current:
            yield current, members, label
            members, label = [], b"-1"
        current = key
        members.append((extension, info.offset_data, info.size))
        if extension == LABEL_MEMBER and (content := archive.extractfile(info)):
            label = content.read().strip()
    if members:
        yield current, members, label
