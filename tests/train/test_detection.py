"""Detection: the metric by hand, the command, exact resume, and refusals."""

import json
import os
import signal
from dataclasses import replace
from multiprocessing import set_start_method
from pathlib import Path

import numpy as np
import pytest
import torch

import train.trainer
from schemas import UserError
from tests.train.detection_data import SHORT, losses, options_of, write_coco, write_encoder
from tests.train.ranks import get_preloaded_context
from train.encoders import load_encoder
from train.evaluate.detection import command
from train.evaluate.detection.command import Schedule
from train.evaluate.detection.data import AnnotatedImage, DetectionDataset
from train.evaluate.detection.metric import average_precision
from train.run_info import describe_run


def build_image(image_id: int, boxes, labels=None, ignored=None) -> AnnotatedImage:
    labels = [1] * len(boxes) if labels is None else labels
    ignored = [False] * len(boxes) if ignored is None else ignored
    return AnnotatedImage(
        image_id,
        Path("none.png"),
        (100, 100),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        np.array(ignored, bool),
        ~np.array(ignored, bool),
        [],
    )


def found(image_id, box, score, label=1):
    x0, y0, x1, y1 = box
    return {
        "image_id": image_id,
        "category_id": label,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "score": score,
    }


def precision(images, detections, classes=("a",)):
    return average_precision(DetectionDataset("t", images, classes, False), detections)


def test_precision_by_hand():
    one = [build_image(0, [[10, 10, 50, 50]])]
    assert precision(one, [found(0, [10, 10, 50, 50], 0.9)])["box_AP"] == pytest.approx(1)
    assert precision(one, []) == {"box_AP": 0, "box_AP50": 0, "box_AP75": 0}
    # 40 x 40 against 40 x 30: an overlap of 0.75, which counts at 0.50 .. 0.75 of ten thresholds
    scores = precision(one, [found(0, [10, 10, 50, 40], 0.9)])
    assert scores["box_AP"] == pytest.approx(0.6)
    assert (scores["box_AP50"], scores["box_AP75"]) == pytest.approx((1, 1))
    # a wrong detection before the right one: precision 1/2 at every recall
    both = [found(0, [60, 60, 90, 90], 0.9), found(0, [10, 10, 50, 50], 0.8)]
    assert precision(one, both)["box_AP"] == pytest.approx(0.5)
    # one of two objects is detected: precision 1 up to recall 0.5, the first 51 of 101 recalls
    two = [build_image(0, [[10, 10, 50, 50], [60, 60, 90, 90]])]
    assert precision(two, [found(0, [10, 10, 50, 50], 0.9)])["box_AP"] == pytest.approx(51 / 101)


def test_ignored_objects_count_neither_way():
    images = [build_image(0, [[10, 10, 50, 50], [60, 60, 90, 90]], ignored=[False, True])]
    right = found(0, [10, 10, 50, 50], 0.8)
    assert precision(images, [right])["box_AP"] == pytest.approx(1)  # no detection
    both = [found(0, [60, 60, 90, 90], 0.9), right]
    assert precision(images, both)["box_AP"] == pytest.approx(1)


def test_classes_count_alike_and_apart():
    images = [build_image(0, [[10, 10, 50, 50]], [1]), build_image(1, [[10, 10, 50, 50]], [2])]
    right, wrong = found(0, [10, 10, 50, 50], 0.9, 1), found(1, [10, 10, 50, 50], 0.9, 1)
    assert precision(images, [right], ("a", "b"))["box_AP50"] == pytest.approx(0.5)
    assert precision(images, [right, wrong], ("a", "b"))["box_AP50"] == pytest.approx(0.5)


# -- the command


@pytest.fixture
def encoder(tmp_path) -> Path:
    return write_encoder(tmp_path / "run")


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "coco"
    write_coco(root, "train2017")
    write_coco(root, "val2017")
    return root


def changed(root: Path, split: str, **first) -> None:
    """Change the first annotation of a split; None removes a key from all of them."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= first
    missing = [key for key, value in first.items() if value is None]
    for one in content["annotations"]:
        for key in missing:
            del one[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": -1}, "--workers -1: must be at least 0"),
        ({"rois": 0}, "--rois 0: must be at least 1"),
        ({"proposals": 0}, "--proposals 0: must be at least 1"),
        ({"test_side": 0}, "--test-side 0: must be at least 1"),
        ({"short_sides": (64, 0)}, "--short-sides 0: must be at least 1"),
    ],
)
def test_options_outside_their_range_are_refused_before_the_training(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        command.evaluate(options_of(tmp_path, tmp_path, **changes))


def train_until_killed(options: command.DetectionOptions, step: int, threads: int) -> None:
    """Run in a separate process that gets SIGKILL after a step, before it is logged."""
    torch.set_num_threads(threads)
    # a plain process, as a user starts it; workers of a forkserver would not notice its end
    set_start_method("fork", force=True)
    command.SCHEDULES["short"] = SHORT
    add = train.trainer.MetricsBuffer.add

    def dying(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train.trainer.MetricsBuffer.add = dying  # type: ignore[method-assign]
    command.evaluate(options)


@pytest.mark.slow
def test_resume_is_exact_after_a_kill_within_a_part(tmp_path, root, encoder, monkeypatch):
    """Kill at step 7 of 8, with a process that reads ahead; the last checkpoint is of step 4."""
    monkeypatch.setitem(command.SCHEDULES, "short", SHORT)
    options = options_of(root, encoder, workers=1)
    row = command.evaluate(replace(options, out=str(tmp_path / "whole")))
    killed = replace(options, out=str(tmp_path / "killed"))
    arguments = (killed, 7, torch.get_num_threads())
    process = get_preloaded_context().Process(target=train_until_killed, args=arguments)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == [
        "step-00000004"
    ]
    assert len(losses(tmp_path / "killed")) == 6
    again = command.evaluate(killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 8
    assert set(row["accuracy"]) == {f"{k}_{n}" for k in ("box", "mask") for n in AVERAGES}
    assert again["accuracy"] == row["accuracy"]
    written = [json.loads(x) for x in (encoder / "results.jsonl").read_text().splitlines()]
    assert written == [row, again]
    assert (tmp_path / "whole" / "detections.png").exists()
    assert "detected" in (tmp_path / "whole" / "detections.html").read_text()


@pytest.mark.slow
def test_resuming_with_other_data_or_another_encoder_is_refused(root, encoder, monkeypatch):
    monkeypatch.setitem(command.SCHEDULES, "short", Schedule(iterations=2, units=2, milestones=()))
    options = options_of(root, encoder)
    command.evaluate(options)
    command.prepare_detection(options)  # preparing it again is the same training
    file = root / "annotations" / "instances_train2017.json"
    before = file.read_text()
    changed(root, "train2017", bbox=[10, 10, 30, 30])
    with pytest.raises(UserError, match=r"step-00000002: made with other settings: data was"):
        command.evaluate(options)
    file.write_text(before)
    write_encoder(encoder, seed=1)
    with pytest.raises(UserError, match=r"other settings: method.sha256 was"):
        command.evaluate(options)


def test_a_test_set_that_does_not_match_the_training_set_is_refused(root, encoder):
    options = options_of(root, encoder)
    changed(root, "val2017", segmentation=None)
    with pytest.raises(UserError, match="coco val2017: has no segmentations, but coco train2017"):
        command.prepare_detection(options)
    changed(root, "train2017", segmentation=None)
    command.prepare_detection(options)  # boxes only on either side
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(UserError, match="coco val2017: no image has an object to detect"):
        command.prepare_detection(options)
    crowd = [one | {"iscrowd": 1} for one in content["annotations"]]
    path.write_text(json.dumps(content | {"annotations": crowd}))
    with pytest.raises(UserError, match="coco val2017: no image has an object to detect"):
        command.prepare_detection(options)
    names = [{"id": 3, "name": "green"}, {"id": 7, "name": "blue"}]
    path.write_text(json.dumps(content | {"categories": names}))
    with pytest.raises(UserError, match="coco val2017: has other classes than coco train2017"):
        command.prepare_detection(options)


def test_messages_are_those_of_a_detector(root, encoder, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(command.SCHEDULES, "short", SHORT)
    torch.save(load_encoder(str(encoder))[0].state_dict(), tmp_path / "foreign.pth")
    options = options_of(root, tmp_path / "foreign.pth", short_sides=(64, 96))
    *_, train_set, test_set, job = command.prepare_detection(options)
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}/foreign.pth: a resnet18\n"
    first, second, third, *_ = describe_run(job.config, job.method, job.views, job.device)
    assert first == "detection, resnet18, short sides of 64 to 96 px, batch 2 on 1 x cpu, fp32"
    assert "1 part of warm-up" in second
    assert third == f"{SHORT.units} parts of {len(job.views)} steps; 5 images"
    assert command.describe_set(test_set) == "coco val2017: 6 images"
    note = "1 without an object to train on"
    assert command.describe_set(train_set, note) == f"coco train2017: 6 images, {note}"


def test_iterations_must_divide_into_equal_parts():
    for schedule in command.SCHEDULES.values():
        assert schedule.compute_part(None) * schedule.units == schedule.iterations
    schedule = Schedule(iterations=3000, units=30, milestones=())
    assert schedule.compute_part(60) == 2
    for asked, nearest in ((100, "90 or 120"), (29, "30"), (0, "30"), (-60, "30")):
        message = f"--iterations {asked}: the schedule has 30 equal parts; take {nearest}$"
        with pytest.raises(UserError, match=message):
            schedule.compute_part(asked)


AVERAGES = ("AP", "AP50", "AP75")
