"""`DATASET=` names -> listed source images.

A source lists its images without reading them, and reads one when asked to. A new source is one
class and one line in `SOURCES`, or `--dataset FILE.py:Class` or `module:Class`.
"""

from collections.abc import Callable, Iterable

from precompute.sources.base import Source, SourceImage, key_of
from schemas.cli import imported, lookup
from schemas.tables import Reject

__all__ = ["SOURCES", "Source", "SourceImage", "key_of", "list_images", "open_source"]

SOURCES = {
    "imagenet": "precompute.sources.trees:ImageNet",
    "imagenet100": "precompute.sources.trees:ImageNet100",
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
    """Open a source by its name in `SOURCES` or as `FILE.py:Class`. Raises UserError."""
    path = name if ":" in name else lookup("dataset", name, SOURCES)
    make: Callable[[str, str, bool], Source] = imported("dataset", path)
    return make(root, split, download)


def list_images(entries: Iterable[SourceImage | Reject]) -> tuple[list[SourceImage], list[Reject]]:
    """All images of a source with keys of their own, and what cannot be one of them."""
    images: dict[str, SourceImage] = {}
    rejects: list[Reject] = []
    for entry in entries:
        if isinstance(entry, Reject):
            rejects.append(entry)
        elif (first := images.setdefault(entry.key, entry)) is not entry:
            detail = f"its key {entry.key} is taken by {first.location}; rename one of the two"
            rejects.append(Reject(entry.location, "key-collision", detail))
    return list(images.values()), rejects
