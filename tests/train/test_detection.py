"""Detection: the metric by hand, odd annotations, exact resume, and that it learns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet50

from schemas import UserError
from tests.train.pictures import write_coco
from tests.train.runs import stopped_after
from train.encoders import build_encoder, save_encoder
from train.evaluate.detection import command
from train.evaluate.detection.data import Picture, Pictures
from train.evaluate.detection.metric import average_precision
from train.evaluate.detection.model import DetectorConfig
from train.evaluate.export import detectron2_name
from train.methods import Setup


def picture(number: int, boxes, labels=None, ignored=None) -> Picture:
    labels = [1] * len(boxes) if labels is None else labels
    ignored = [False] * len(boxes) if ignored is None else ignored
    return Picture(
        number,
        Path("none.png"),
        (100, 100),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(ignored, bool),
        ~np.array(ignored, bool),
        [],
    )


def found(number, box, score, label=1):
    x0, y0, x1, y1 = box
    return {
        "image_id": number,
        "category_id": label,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": score,
    }


def precision(pictures, detections, classes=("a",)):
    return average_precision(Pictures("t", pictures, classes, False), detections)


def test_precision_by_hand():
    one = [picture(0, [[10, 10, 50, 50]])]
    assert precision(one, [found(0, [10, 10, 50, 50], 0.9)])["box_AP"] == pytest.approx(1)
    assert precision(one, []) == {"box_AP": 0, "box_AP50": 0, "box_AP75": 0}
    # 40 x 40 against 40 x 30: an overlap of 0.75, which counts at 0.50 .. 0.75 of ten thresholds
    scores = precision(one, [found(0, [10, 10, 50, 40], 0.9)])
    assert scores["box_AP"] == pytest.approx(0.6)
    assert (scores["box_AP50"], scores["box_AP75"]) == pytest.approx((1, 1))
    # a wrong one before the right one: precision 1/2 at every recall
    both = [found(0, [60, 60, 90, 90], 0.9), found(0, [10, 10, 50, 50], 0.8)]
    assert precision(one, both)["box_AP"] == pytest.approx(0.5)
    # of two objects one is found: precision 1 up to recall 0.5, the first 51 of 101 recalls
    two = [picture(0, [[10, 10, 50, 50], [60, 60, 90, 90]])]
    assert precision(two, [found(0, [10, 10, 50, 50], 0.9)])["box_AP"] == pytest.approx(51 / 101)


def test_ignored_objects_count_neither_way():
    pictures = [picture(0, [[10, 10, 50, 50], [60, 60, 90, 90]], ignored=[False, True])]
    right = found(0, [10, 10, 50, 50], 0.8)
    assert precision(pictures, [right])["box_AP"] == pytest.approx(1)  # not finding it
    both = [found(0, [60, 60, 90, 90], 0.9), right]
    assert precision(pictures, both)["box_AP"] == pytest.approx(1)


def test_classes_count_alike_and_apart():
    pictures = [picture(0, [[10, 10, 50, 50]], [1]), picture(1, [[10, 10, 50, 50]], [2])]
    right, wrong = found(0, [10, 10, 50, 50], 0.9, 1), found(1, [10, 10, 50, 50], 0.9, 1)
    assert precision(pictures, [right], ("a", "b"))["box_AP50"] == pytest.approx(0.5)
    assert precision(pictures, [right, wrong], ("a", "b"))["box_AP50"] == pytest.approx(0.5)


# -- sets


@pytest.fixture
def encoder(tmp_path) -> Path:
    torch.manual_seed(0)
    network, _ = build_encoder("resnet18")
    folder = tmp_path / "run"
    folder.mkdir()
    metadata = {
        "encoder": "resnet18", "method": "moco", "recipe": "hp", "crop_size": "224", "seed": "0",
        "high_pass": "False", "high_pass_kernel": "11", "high_pass_sigma": "5.0",
    }  # fmt: skip
    save_encoder(folder / "encoder.safetensors", network, metadata)
    return folder


def options_of(root: Path, encoder: Path, **changes) -> command.DetectionOptions:
    options = command.DetectionOptions(
        encoder=str(encoder), dataset="coco", root=str(root), iterations=30, batch_size=2,
        short_sides=(64,), test_side=64, rois=4, proposals=4, workers=0, device="cpu",
        log_steps=1, precision="fp32",
    )  # fmt: skip
    return replace(options, **changes)


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_it_learns_and_goes_on_exactly_where_it_was_stopped(tmp_path, encoder, monkeypatch):
    """So short a training only lowers the loss; docs/detection.md has a longer one."""
    root = tmp_path / "coco"
    write_coco(root, "train2017")
    write_coco(root, "val2017")
    options = options_of(root, encoder)
    row = command.evaluate(replace(options, out=str(tmp_path / "whole")))
    told = losses(tmp_path / "whole")
    assert len(told) == 30
    assert np.mean(told[-5:]) < 0.8 * np.mean(told[:5])
    assert set(row["accuracy"]) == {f"{k}_{n}" for k in ("box", "mask") for n in AVERAGES}
    assert (tmp_path / "whole" / "detections.png").exists()
    assert "found" in (tmp_path / "whole" / "detections.html").read_text()
    assert json.loads((encoder / "results.jsonl").read_text()) == row

    with stopped_after(8, monkeypatch):
        command.evaluate(replace(options, out=str(tmp_path / "stopped")))
    again = command.evaluate(replace(options, out=str(tmp_path / "stopped")))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert again["accuracy"] == row["accuracy"]


def test_other_data_or_another_encoder_do_not_go_on(tmp_path, encoder):
    root = tmp_path / "coco"
    write_coco(root, "train2017")
    write_coco(root, "val2017", categories=[{"id": 3, "name": "green"}, {"id": 7, "name": "blue"}])
    with pytest.raises(UserError, match="other classes"):
        command.evaluate(options_of(root, encoder))


def test_detector_has_r50_c4s_parts_and_the_encoders_weights(tmp_path):
    """What detectron2's R50-C4 expects of the encoder, by its names; and all of it trains."""
    torch.manual_seed(0)
    network, _ = build_encoder("resnet50")
    save_encoder(tmp_path / "encoder.safetensors", network, {"encoder": "resnet50"})
    config = DetectorConfig(path=str(tmp_path), sha256="", masks=True, short_sides=(96,))
    method = config.build(Setup(encoder="resnet50", batch_size=2, classes=80))
    body, head = method.network.backbone, method.network.roi_heads.box_head
    assert torch.equal(body.conv1.weight, network.conv1.weight)
    assert torch.equal(head.layer4[2].conv3.weight, network.layer4[2].conv3.weight)
    assert body(torch.randn(1, 3, 64, 64)).shape == (1, 1024, 4, 4)
    assert head(torch.randn(2, 1024, 14, 14)).shape == (2, 2048)
    assert method.network.roi_heads.box_predictor.cls_score.out_features == 81
    assert method.network.rpn.anchor_generator.num_anchors_per_location() == [15]
    assert all(p.requires_grad for p in method.parameters())
    blocks = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}
    expected = {"stem.conv1.weight", *(f"stem.conv1.norm.{x}" for x in NORM)}
    for stage, count in blocks.items():
        for block in range(count):
            convs = ["conv1", "conv2", "conv3"] + ["shortcut"] * (block == 0)
            for conv in convs:
                expected |= {f"{stage}.{block}.{conv}.weight"}
                expected |= {f"{stage}.{block}.{conv}.norm.{x}" for x in NORM}
    names = {detectron2_name(name) for name in network.state_dict()}
    assert {name for name in names if not name.endswith("num_batches_tracked")} == expected
    theirs = resnet50().state_dict()
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
    }


AVERAGES = ("AP", "AP50", "AP75")
NORM = ("weight", "bias", "running_mean", "running_var")
