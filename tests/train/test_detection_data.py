"""Detection: sets of pictures, odd annotations, batches."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from schemas import UserError
from tests.train.pictures import odd_coco, shapes, write_coco
from train.evaluate.detection.data import Pictures, coco, voc
from train.evaluate.detection.views import DetectionViews, Flipped, masks_of

CPU = torch.device("cpu")


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
