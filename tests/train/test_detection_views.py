"""Detection: batches of the loader."""

import pytest
import torch
from PIL import Image

from schemas import UserError
from tests.train.pictures import odd_coco, shapes
from train.evaluate.detection.data import Pictures
from train.evaluate.detection.loader import DetectionLoader, FlipDataset

CPU = torch.device("cpu")


def views_of(data: Pictures, *, size=1, number=0, world=1, workers=0) -> DetectionLoader:
    return DetectionLoader(
        data, batch_size=size, epoch_steps=4, workers=workers, device=CPU, rank=number,
        world_size=world, seed=5,
    )  # fmt: skip


def test_flips_move_boxes_and_masks_with_the_picture(tmp_path):
    data = odd_coco(tmp_path)
    flipped = 0
    for place in range(12):
        image, target, _ = FlipDataset(data.select_trainable(), True, 0)[place, 1]
        (box,) = target["boxes"].round().long().tolist()
        inside = image[0, box[1] : box[3], box[0] : box[2]]
        assert inside.mean() > 0.8  # the picture with the red box
        assert target["masks"][0, box[1] : box[3], box[0] : box[2]].float().mean() > 0.9
        flipped += box[0] != shapes(1)[1][0]
    assert 0 < flipped < 12


def test_ranks_share_each_pass_and_a_state_goes_on_exactly(tmp_path):
    data = odd_coco(tmp_path)  # five trainable pictures
    alone = [b.sample_keys for _ in range(3) for b in views_of(data, size=2)]  # over several epochs
    views = views_of(data, size=2)
    stream = [b.sample_keys for _ in range(3) for b in views]
    ranks = [views_of(data, number=number, world=2) for number in range(2)]
    parts = [[b.sample_keys for _ in range(3) for b in one] for one in ranks]
    assert [a + b for a, b in zip(*parts, strict=True)] == stream
    flat = [key for batch in stream for key in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted({*flat})
    assert alone[:4] == stream[:4]

    again = views_of(data, size=2)
    again.load_state_dict({"step": 6})
    rest = [b for _ in range(2) for b in again]
    assert [b.sample_keys for b in rest] == stream[6:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_not_as_annotated_ends_in_one_line(tmp_path, workers):
    """The error arrives from a worker process too."""
    data = odd_coco(tmp_path)
    path = data.pictures[2].path
    Image.new("RGB", (96, 128)).save(path)
    message = f"{path}: has 128 x 96 pixels, but 96 x 128 by its annotation"
    with pytest.raises(UserError) as caught:
        list(views_of(data, size=5, workers=workers))
    assert str(caught.value) == message
    for content, why in (
        (b"no picture", "cannot identify image file"),
        (path.read_bytes()[:700], "image file is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(views_of(data, size=5, workers=workers))
        assert str(caught.value).startswith(f"{path}: cannot be decoded ({why}")
        assert "\n" not in str(caught.value)
