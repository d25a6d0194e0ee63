"""Sources of images, selected by `--dataset`.

A source lists its images without reading them, and reads single images on request. To add one,
write a class and a line in `SOURCES`, or pass it as `--dataset FILE.py:Class` or `module:Class`.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import Any

from precompute.sources.base import (
    PartedSource,
    Source,
    SourceImage,
    compute_walk_key,
    join_parts,
    key_of,
    list_in_parallel,
    list_parts,
    make_unique_key,
)
from schemas.cli import import_object, lookup
from schemas.errors import UserError
from schemas.tables import Reject

__all__ = [
    "SOURCES",
    "Source",
    "SourceImage",
    "key_of",
    "list_images",
    "list_source",
    "open_source",
]

SOURCES = {
    "imagenet": "precompute.sources.imagenet:ImageNet",
    "imagenet100": "precompute.sources.imagenet:ImageNet100",
    "imagenette": "precompute.sources.trees:Imagenette",
    "caltech101": "precompute.sources.small:Caltech101",
    "flowers102": "precompute.sources.small:Flowers102",
    "stl10": "precompute.sources.small:Stl10",
    "cifar10": "precompute.sources.small:Cifar10",
    "voc": "precompute.sources.annotated:Voc",
    "coco": "precompute.sources.annotated:Coco",
    "coco-instances": "precompute.sources.annotated:CocoInstances",
    "folder": "precompute.sources.trees:Folder",
    "files": "precompute.sources.trees:Files",
    "webdataset": "precompute.sources.webdataset:WebDatasetShards",
    "demo": "precompute.sources.demo:DemoScenes",
}
"""Import path of each source's class; importing them all here would always import torchvision."""

NOT_DOWNLOADED = ("folder", "files", "webdataset", "demo")
"""Sources that read what is there already; those of datasets decide about a download themselves."""


def open_source(name: str, root: str, split: str, download: bool, **options: Any) -> Source:
    """Open a source by its name in `SOURCES` or as `FILE.py:Class`.

    Args:
        options: options that only some sources have, such as `image_member` of tars.

    Raises:
        UserError: there is no such source or root, the source does not have an option, or there is
            nothing to download.
    """
    if download and name in NOT_DOWNLOADED:
        raise UserError(f"--download fetches datasets of torchvision; {name} is none: leave it out")
    path = name if ":" in name else lookup("dataset", name, SOURCES)
    make: Callable[..., Source] = import_object("dataset", path)
    if unknown := [option for option in options if option not in signature(make).parameters]:
        option = unknown[0].replace("_", "-")
        raise UserError(f"--{option} is an option of DATASET=webdataset, not of {name}")
    return make(root, split, download, **options)


def list_source(source: Source) -> Iterator[SourceImage | Reject]:
    """List a source as `source.images()` does, but several of its parts in parallel."""
    if not isinstance(source, PartedSource):
        return source.images()
    return join_parts(source, list_in_parallel(source, list_parts(source)))


def list_images(entries: Iterable[SourceImage | Reject]) -> tuple[list[SourceImage], list[Reject]]:
    """Give all images of a source unique keys, and collect the rejects.

    If several images have the same key, the first one by `compute_walk_key` keeps it, and a digest
    of the location is added to the keys of the others, so the result does not depend on the order
    of the entries. An image that is listed a second time becomes a reject.
    """
    first: dict[str, SourceImage] = {}
    groups: dict[str, dict[str, SourceImage]] = {}
    rejects: list[Reject] = []
    for entry in entries:
        if isinstance(entry, Reject):
            rejects.append(entry)
        elif entry.key not in first:
            first[entry.key] = entry
        else:
            earlier = first[entry.key]
            group = groups.setdefault(entry.key, {earlier.location: earlier})
            if entry.location in group:
                rejects.append(Reject(entry.location, "duplicate", "listed more than once"))
            else:
                group[entry.location] = entry
    later: dict[str, SourceImage] = {}
    for key, group in sorted(groups.items()):
        first[key], *clashing = sorted(
            group.values(), key=lambda image: compute_walk_key(image.location)
        )
        for image in clashing:
            own = make_unique_key(key, image.location, ChainMap(first, later))
            later[own] = image._replace(key=own)
    return [*first.values(), *later.values()], rejects
