"""Images of a batch are used again only when nobody holds them."""

import torch

from pipeline import MaskedViews
from pipeline.memory import KEPT, Buffers
from schemas import ShardDataset
from tests.pipeline.conftest import small


def test_memory_is_used_again_when_no_view_of_it_is_left() -> None:
    buffers = Buffers()
    first = buffers.empty(2, 8)
    assert first.shape == (2, 3, 8, 8)
    assert first.is_contiguous(memory_format=torch.channels_last)
    place = first.data_ptr()
    assert buffers.empty(2, 8).data_ptr() != place
    part = first[1, :, 0]
    del first
    assert buffers.empty(2, 8).data_ptr() != place
    del part
    assert place in {image.data_ptr() for image in [buffers.empty(2, 8) for _ in range(3)]}
    assert buffers.empty(3, 8).shape == (3, 3, 8, 8)


def test_what_many_hold_is_their_own() -> None:
    buffers = Buffers()
    held = [buffers.empty(1, 8).fill_(number) for number in range(3 * KEPT)]
    assert all((image == number).all() for number, image in enumerate(held))


def test_batches_that_are_kept_stay_as_they_were(dataset: ShardDataset) -> None:
    views = MaskedViews(dataset.url, small("hp"), 4, "cpu")
    kept = list(views)
    copies = [batch.query.clone() for batch in kept]
    masks_of = [batch.hard_negative[2:].clone() for batch in kept]  # type: ignore[index]
    rows = [batch.hard_negative[2:] for batch in kept]  # type: ignore[index]
    images = [batch.query for batch in kept]
    del kept
    list(views)
    assert all(torch.equal(a, b) for a, b in zip(images, copies, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(rows, masks_of, strict=True))
