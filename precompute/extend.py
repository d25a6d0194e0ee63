"""Find the images that `--extend` adds to a complete dataset, in new shards after the existing."""

import pyarrow as pa
import pyarrow.compute as pc

from precompute.resume import read_dataset_markers
from precompute.sources import SourceImage
from precompute.sources.base import KEY_DIGITS, digest_key, make_unique_key
from schemas.dataset import read_card
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.storage import Store
from schemas.tables import CARD, DatasetCard, Reject


def select_new(
    out: str, images: list[SourceImage], rejects: list[Reject], classes: list[str]
) -> tuple[DatasetCard, list[SourceImage], list[Reject]]:
    """Return the card of the dataset, the images that are new to it, and the rejects.

    An image is new if its location was neither written nor rejected before. Existing keys stay; if
    the key of a new image is taken, a digest is added to the new one.

    Raises:
        UserError: there is no complete dataset, or its labels would change their meaning.
    """
    store = Store(out)
    if not store.exists(CARD):
        raise UserError(f"{out}: no complete dataset to extend; omit --extend")
    # Read the card and the shards' markers, because an extension that was interrupted at its very
    # end may have written the tables already.
    card = read_card(store)
    old_classes, classes = card.classes, [to_stored(name) for name in classes]
    if classes[: len(old_classes)] != old_classes:
        raise UserError(
            f"{out}: its labels would change: it has the classes {', '.join(old_classes[:5])} ..., "
            f"the source {', '.join(classes[:5])} ...; new classes must come behind the old ones"
        )
    unseen = {to_stored(image.location) for image in images}
    chunks: list[pa.Array] = []
    for marker in read_dataset_markers(store, card.shards):
        chunks += marker.samples["key"].chunks
        unseen.difference_update(marker.samples["source"].to_pylist())
        unseen.difference_update(reject.source for reject in marker.rejects)
    new_images = [image for image in images if to_stored(image.location) in unseen]
    return card, rename(new_images, images, pa.chunked_array(chunks, pa.string())), rejects


def rename(
    new_images: list[SourceImage], images: list[SourceImage], keys: pa.ChunkedArray
) -> list[SourceImage]:
    """Return the new images; those whose key is in the dataset get another one.

    Args:
        images: all images of the source, which have different keys.
        keys: all keys of the dataset. Arrow needs about 30 bytes for each, a set of strings several
            times that.
    """
    used_keys = find_keys(keys, {image.key for image in new_images})
    if not used_keys:
        return new_images
    clashing = [image for image in new_images if image.key in used_keys]
    candidates = {
        digest_key(image.key, image.location, digits) for image in clashing for digits in KEY_DIGITS
    }
    used_keys |= find_keys(keys, candidates) | {image.key for image in images}
    own_keys: dict[str, str] = {}
    for image in clashing:
        own_keys[image.key] = make_unique_key(image.key, image.location, used_keys)
        used_keys.add(own_keys[image.key])
    return [image._replace(key=own_keys.get(image.key, image.key)) for image in new_images]


def find_keys(keys: pa.ChunkedArray, wanted: set[str]) -> set[str]:
    """Return the wanted keys that are among `keys`."""
    is_wanted = pc.is_in(keys, pa.array(sorted(wanted), pa.string()))
    return set(keys.filter(is_wanted).to_pylist())
