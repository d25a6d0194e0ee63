"""The photos that a benchmark measures."""

from precompute.sources import Source, SourceImage, list_images
from precompute.sources.trees import Folder
from schemas.errors import UserError


def list_photos(root: str) -> tuple[Source, list[SourceImage]]:
    """Return a folder of photos as a source, and its images. Raises UserError if it has none."""
    source = Folder(root, "train", False)
    images, _ = list_images(source.images())
    if not images:
        raise UserError(f"{root}: no images in it")
    return source, images
