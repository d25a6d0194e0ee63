"""Detection: overfit two real images."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import DATA, existing
from tests.train.detection_data import options_of, write_encoder
from train.encoders import build_encoder, save_encoder
from train.evaluate.detection import command, roi_heads
from train.evaluate.detection.command import Schedule

SPLITS = ("train2017", "val2017")


def write_two_images(root: Path, source: Path) -> None:
    """Write a dataset whose two splits are the first two images with a few large objects."""
    content = json.loads((source / "annotations/instances_train2017.json").read_text())
    of_image: dict[int, list] = {one["id"]: [] for one in content["images"]}
    for one in content["annotations"]:
        of_image[one["image_id"]].append(one)
    chosen = [
        image
        for image in content["images"]
        if (objects := of_image[image["id"]])
        and len(objects) <= 3
        and all(
            one["bbox"][2] * one["bbox"][3] > 0.08 * image["height"] * image["width"]
            and not one["iscrowd"]
            for one in objects
        )
    ][:2]
    content |= {"images": chosen, "annotations": [x for one in chosen for x in of_image[one["id"]]]}
    (root / "annotations").mkdir(parents=True)
    for split in SPLITS:
        (root / split).symlink_to(source / "images" / "train2017")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_detector_overfits_two_real_images(tmp_path, monkeypatch):
    """AP50 of boxes on the training images rises (observed: 1.0, 0.83 and 0.33) from 0."""
    source = existing(DATA / "coco128")
    weights = existing(DATA / "weights" / "resnet18_imagenet_partial_no_layer4_3x3_f16.pt")
    write_two_images(tmp_path / "coco", source)
    encoder = write_encoder(tmp_path / "run")
    network, _ = build_encoder("resnet18")
    known = {name: x.float() for name, x in torch.load(weights, weights_only=True).items()}
    network.load_state_dict(known, strict=False)
    metadata = {"encoder": "resnet18", "high_pass": "False", "crop_size": "224"}
    save_encoder(encoder / "encoder.safetensors", network, metadata)
    # layer4 on RoIs takes most of the time: 8 x 8 cells have a third of the published 14 x 14
    monkeypatch.setattr(roi_heads, "ROI_SIZE", 8)
    # such a short training needs a high rate: 0.02 at a batch of 2
    monkeypatch.setattr(command, "REFERENCE_LR", 0.16)
    monkeypatch.setitem(command.SCHEDULES, "short", Schedule(60, 10, (8,)))
    options = options_of(
        tmp_path / "coco", encoder, short_sides=(128,), test_side=128, rois=8, proposals=30
    )
    accuracy = command.evaluate(options)["accuracy"]
    assert accuracy["box_AP50"] > 0.3, accuracy
