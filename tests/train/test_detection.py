"""Detection: the metric by hand, odd annotations, exact resume, and that it learns."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

import train.loop
from schemas import UserError
from train.encoders import build_encoder, save_encoder
from train.evaluate.detection import command
from train.evaluate.detection.data import Picture, Pictures, coco, voc
from train.evaluate.detection.metric import average_precision
from train.evaluate.detection.model import DetectorConfig
from train.evaluate.detection.views import DetectionViews, Flipped, masks_of
from train.evaluate.export import detectron2_name
from train.methods import Setup

CPU = torch.device("cpu")


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


def shapes(index: int) -> tuple[np.ndarray, list[float]]:
    """A bright box on dark ground, and where it is."""
    random = np.random.default_rng(index)
    pixels = random.integers(0, 60, (96, 128, 3), dtype=np.uint8)
    x, y = (int(v) for v in random.integers(5, 40, 2))
    width, height = (int(v) for v in random.integers(40, 56, 2))
    pixels[y : y + height, x : x + width] = (230, 40, 40) if index % 2 else (40, 220, 60)
    return pixels, [x, y, width, height]


def write_coco(root: Path, split: str, count: int = 6, **changes) -> Path:
    """A tree of the true layout: rectangles as polygons, one crowd, one picture of nothing."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        pixels, (x, y, width, height) = shapes(index)
        Image.fromarray(pixels).save(root / split / f"{index:012d}.jpg", quality=95)
        images.append({"id": index, "file_name": f"{index:012d}.jpg", "height": 96, "width": 128})
        if index == count - 1:
            continue
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotations.append(
            {
                "id": index + 1,
                "image_id": index,
                "category_id": 7 if index % 2 else 3,
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "green"}, {"id": 7, "name": "red"}],
        **changes,
    }
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def odd_coco(root: Path, **one) -> Pictures:
    file = write_coco(root, "train2017")
    content = json.loads(file.read_text())
    content["annotations"][0] |= one
    file.write_text(json.dumps(content))
    return coco(str(root), "train2017")


def test_coco_is_read_as_it_means(tmp_path):
    data = odd_coco(tmp_path)
    assert data.classes == ("green", "red")
    assert [p.labels.tolist() for p in data.pictures] == [[1], [2], [1], [2], [1], []]
    assert len(data.trainable()) == 5  # one has no object
    x, y, width, height = shapes(1)[1]
    assert data.pictures[1].boxes.tolist() == [[x, y, x + width, y + height]]
    pixels = masks_of(data.pictures[1])[0]
    rows, columns = np.nonzero(pixels)
    assert abs(rows.min() - y) <= 1
    assert abs(columns.max() - (x + width - 1)) <= 1


def test_odd_objects_are_counted(tmp_path):
    cut = odd_coco(tmp_path / "a", bbox=[100, 80, 60, 60])
    assert cut.pictures[0].boxes.tolist() == [[100, 80, 128, 96]]
    assert cut.odd == Counter({"boxes cut to their picture": 1})
    flat = odd_coco(tmp_path / "b", bbox=[10, 10, 0, 30])
    assert flat.odd == Counter({"boxes without area left out": 1})
    assert len(flat.pictures[0].boxes) == 0
    crowd = odd_coco(tmp_path / "c", iscrowd=1)
    assert crowd.pictures[0].ignored.tolist() == [True]
    assert len(crowd.trainable()) == 4


def test_what_nobody_could_mean_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"instances_train2017.json: annotation 1 is of category 9"):
        odd_coco(tmp_path / "a", category_id=9)
    write_coco(tmp_path / "b", "train2017")
    (tmp_path / "b" / "train2017" / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000002.jpg: no such picture"):
        coco(str(tmp_path / "b"), "train2017")
    with pytest.raises(UserError, match=r"no .*instances_val2017.json"):
        coco(str(tmp_path / "b"), "val2017")
    with pytest.raises(UserError, match=r"no VOCdevkit/VOC2007 with a set test"):
        voc(str(tmp_path), ("2007",), "test")


def write_voc(root: Path, objects: str) -> str:
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000001\n")
    Image.new("RGB", (128, 96)).save(base / "JPEGImages/000001.jpg")
    size = "<size><width>128</width><height>96</height><depth>3</depth></size>"
    text = f"<annotation><filename>000001.jpg</filename>{size}{objects}</annotation>"
    (base / "Annotations/000001.xml").write_text(text)
    return str(root)


def voc_object(name: str, difficult: int = 0) -> str:
    box = "<xmin>1</xmin><ymin>11</ymin><xmax>50</xmax><ymax>60</ymax>"
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{box}</bndbox></object>"
    )


def test_voc_counts_from_one_and_keeps_difficult_objects_in_training(tmp_path):
    root = write_voc(tmp_path / "a", voc_object("dog") + voc_object("cat", difficult=1))
    (one,) = voc(root, ("2007",), "trainval").pictures
    assert one.boxes.tolist() == [[0, 10, 50, 60]] * 2
    assert one.labels.tolist() == [12, 8]
    assert one.ignored.tolist() == [False, True]
    assert one.trains.all()
    assert not voc(write_voc(tmp_path / "b", ""), ("2007",), "trainval").trainable()
    for objects, message in (
        (voc_object("unicorn"), r"000001.xml: unknown class 'unicorn'"),
        ("<object><name>dog</name></object>", r"000001.xml: cannot be read \(KeyError"),
    ):
        folder = tmp_path / message[-9:-1].replace("'", "")
        with pytest.raises(UserError, match=message):
            voc(write_voc(folder, objects), ("2007",), "trainval")


def test_real_voc_tree_is_read(tmp_path):
    from tests.conftest import DATA, existing

    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2007").symlink_to(existing(DATA / "coco128_voc"))
    data = voc(str(tmp_path), ("2007",), "trainval")
    assert len(data.pictures) == 97
    assert all((p.boxes[:, 2:] > p.boxes[:, :2]).all() for p in data.pictures)


# -- batches


def views_of(data: Pictures, *, size=1, number=0, world=1, **options) -> DetectionViews:
    return DetectionViews(
        data, batch_size=size, unit=4, workers=0, device=CPU, rank=number, world_size=world, seed=5,
        **options,
    )  # fmt: skip


def test_flips_move_boxes_and_masks_with_the_picture(tmp_path):
    data = odd_coco(tmp_path)
    flipped = 0
    for place in range(12):
        image, target, _ = Flipped(data.trainable(), True, 0)[place, 1]
        (box,) = target["boxes"].round().long().tolist()
        inside = image[0, box[1] : box[3], box[0] : box[2]]
        assert inside.mean() > 0.8  # it is the red one
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


# -- the job


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

    class Stop(Exception):
        pass

    add = train.loop.Meter.add

    def stopping(self, scalars, waited, **known):
        add(self, scalars, waited, **known)
        if known["step"] == 8:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Meter, "add", stopping)
        with pytest.raises(Stop):
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
