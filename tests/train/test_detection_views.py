"""Detection: batches of the loader."""

import os
import signal
from multiprocessing import set_start_method
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from schemas import UserError
from tests.train.detection_data import odd_coco, shapes
from tests.train.ranks import get_preloaded_context
from train.evaluate.detection.data import DetectionDataset
from train.evaluate.detection.loader import DetectionLoader, FlipDataset

CPU = torch.device("cpu")


def views_of(data: DetectionDataset, *, size=1, number=0, world=1, workers=0) -> DetectionLoader:
    return DetectionLoader(
        data, batch_size=size, epoch_steps=4, workers=workers, device=CPU, rank=number,
        world_size=world, seed=5,
    )  # fmt: skip


def read_keys(views: DetectionLoader, epochs: int) -> list[list[str]]:
    """Read this many epochs from the loader's current step; return the keys of each batch."""
    return [batch.sample_keys for _ in range(epochs) for batch in views]


def test_flips_move_boxes_and_masks_with_the_image(tmp_path):
    data = odd_coco(tmp_path)
    flipped = 0
    for place in range(12):
        image, target, _ = FlipDataset(data.select_trainable(), True, 0)[place, 1]
        (box,) = target["boxes"].round().long().tolist()
        inside = image[0, box[1] : box[3], box[0] : box[2]]
        assert inside.mean() > 0.8  # the image with the red box
        assert target["masks"][0, box[1] : box[3], box[0] : box[2]].float().mean() > 0.9
        flipped += box[0] != shapes(1)[1][0]
    assert 0 < flipped < 12


def test_ranks_share_each_pass_and_resume_is_exact(tmp_path):
    data = odd_coco(tmp_path)  # five trainable images, so three epochs of 4 x 2 are several passes
    stream = read_keys(views_of(data, size=2), epochs=3)
    ranks = [read_keys(views_of(data, number=number, world=2), epochs=3) for number in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == stream
    flat = [key for batch in stream for key in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted({*flat})

    resumed = views_of(data, size=2)
    resumed.load_state_dict({"step": 6})
    assert read_keys(resumed, epochs=2) == stream[6:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_match_its_annotation_gives_a_one_line_error(tmp_path, workers):
    """The error arrives from a worker process too."""
    data = odd_coco(tmp_path)
    path = data.images[2].path
    Image.new("RGB", (96, 128)).save(path)
    message = f"{path}: has 128 x 96 pixels, but 96 x 128 by its annotation"
    with pytest.raises(UserError) as caught:
        list(views_of(data, size=5, workers=workers))
    assert str(caught.value) == message
    for content, why in (
        (b"no image", "cannot identify image file"),
        (path.read_bytes()[:700], "image file is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            list(views_of(data, size=5, workers=workers))
        assert str(caught.value).startswith(f"{path}: cannot be decoded ({why}")
        assert "\n" not in str(caught.value)


def read_after_a_signal_to_the_group(folder: Path, batches: Any) -> None:
    """Get SIGTERM with all processes of the group, as from `timeout`, and read on."""
    set_start_method("fork", force=True)
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: None)
    views = views_of(odd_coco(folder), workers=1)
    stream = iter(views)
    keys = [next(stream).sample_keys]
    os.killpg(0, signal.SIGTERM)
    keys += [batch.sample_keys for batch in stream] + read_keys(views, epochs=3)
    views.close()
    batches.put(keys)


def test_a_signal_to_the_process_group_leaves_the_workers_alive(tmp_path):
    """The trainer saves after it, and still needs batches."""
    context = get_preloaded_context()
    batches = context.Queue()
    process = context.Process(target=read_after_a_signal_to_the_group, args=(tmp_path, batches))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert len(batches.get(timeout=10)) == 16
