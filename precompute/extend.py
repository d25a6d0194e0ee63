"""Find the images that `--extend` adds to a complete dataset, in new shards after the existing."""

from precompute.sources import SourceImage
from precompute.sources.base import free_key
from schemas.dataset import ShardDataset
from schemas.errors import UserError
from schemas.names import to_stored
from schemas.shard import read_markers
from schemas.storage import Store
from schemas.tables import CARD, DatasetCard, Reject


def only_new(
    out: str, images: list[SourceImage], rejects: list[Reject], classes: list[str]
) -> tuple[DatasetCard, list[SourceImage], list[Reject]]:
    """Return the card of the dataset, the images that are new to it, and the rejects.

    An image is new if its location was neither written nor rejected before. Existing keys stay; if
    the key of a new image is taken, a digest is added to the new one.

    Raises:
        UserError: there is no complete dataset, or its labels would change their meaning.
    """
    if not Store(out).exists(CARD):
        raise UserError(f"{out}: no whole dataset that could be extended; leave --extend out")
    dataset = ShardDataset.open(out)
    there, classes = dataset.classes, [to_stored(name) for name in classes]
    if classes[: len(there)] != there:
        raise UserError(
            f"{out}: its labels would change: it has the classes {', '.join(there[:5])} ..., the "
            f"source {', '.join(classes[:5])} ...; new classes must come behind the old ones"
        )
    # Read from the shards' markers, because an extension that was interrupted at its very end may
    # have written the tables already.
    keys: set[str] = set()
    known: set[str] = set()
    for marker in read_markers(dataset.store, range(dataset.card.shards)):
        keys.update(marker.samples["key"].to_pylist())
        known.update(marker.samples["source"].to_pylist())
        known.update(reject.source for reject in marker.rejects)
    new: list[SourceImage] = []
    taken = keys | {image.key for image in images}
    for image in images:
        if to_stored(image.location) in known:
            continue
        if image.key in keys:
            own = free_key(image.key, image.location, taken)
            taken.add(own)
            new.append(image._replace(key=own))
        else:
            new.append(image)
    return dataset.card, new, rejects
