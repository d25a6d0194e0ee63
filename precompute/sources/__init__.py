"""`DATASET=` names -> listed source images.

A source lists its images without reading them, and reads one when asked to. A new source is one
class and one line in `SOURCES`, or `--dataset module:Class`.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable

from precompute.sources.base import Source, SourceImage, free_key, key_of, walk_order
from schemas.cli import imported, lookup
from schemas.tables import Reject

__all__ = ["SOURCES", "Source", "SourceImage", "key_of", "list_images", "open_source"]

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
    "demo": "precompute.demo:DemoScenes",
}
"""Where each is: importing them all would import torchvision for a folder of files."""


def open_source(name: str, root: str, split: str, download: bool) -> Source:
    """Open a source by its name in `SOURCES` or as `module:Class`. Raises UserError."""
    path = name if ":" in name else lookup("dataset", name, SOURCES)
    make: Callable[[str, str, bool], Source] = imported("dataset", path)
    return make(root, split, download)


def list_images(entries: Iterable[SourceImage | Reject]) -> tuple[list[SourceImage], list[Reject]]:
    """List all images of a source with keys of their own, and what cannot be one of them.

    Of different images with one key, the first in the order of a tree keeps it; each of the others
    gets a digest of its location into its key. Which one that is does not depend on the order of
    the entries. An image that is listed twice is a reject the second time.
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
            there = first[entry.key]
            group = groups.setdefault(entry.key, {there.location: there})
            if group.setdefault(entry.location, entry) is not entry or entry is there:
                rejects.append(Reject(entry.location, "duplicate", "listed more than once"))
    later: dict[str, SourceImage] = {}
    for key, group in sorted(groups.items()):
        first[key], *others = sorted(group.values(), key=lambda image: walk_order(image.location))
        for image in others:
            own = free_key(key, image.location, ChainMap(first, later))
            later[own] = image._replace(key=own)
    return [*first.values(), *later.values()], rejects
