"""Detection: reading sets of images and unusual annotations."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from schemas import UserError
from tests.train.detection_data import odd_coco, shapes, voc_object, write_coco, write_voc
from train.evaluate.detection.coco import read_coco
from train.evaluate.detection.loader import decode_masks
from train.evaluate.detection.voc import read_voc

CPU = torch.device("cpu")


def test_coco_is_read_correctly(tmp_path):
    data = odd_coco(tmp_path)
    assert data.classes == ("green", "red")
    assert [p.labels.tolist() for p in data.images] == [[1], [2], [1], [2], [1], []]
    assert len(data.select_trainable()) == 5  # one image has no object
    x, y, width, height = shapes(1)[1]
    assert data.images[1].boxes.tolist() == [[x, y, x + width, y + height]]
    pixels = decode_masks(data.images[1])[0]
    rows, columns = np.nonzero(pixels)
    assert abs(rows.min() - y) <= 1
    assert abs(columns.max() - (x + width - 1)) <= 1


def test_odd_objects_are_counted(tmp_path):
    cut = odd_coco(tmp_path / "a", bbox=[100, 80, 60, 60])
    assert cut.images[0].boxes.tolist() == [[100, 80, 128, 96]]
    assert cut.odd == Counter({"boxes clipped to the image": 1})
    flat = odd_coco(tmp_path / "b", bbox=[10, 10, 0, 30])
    assert flat.odd == Counter({"boxes without area left out": 1})
    assert len(flat.images[0].boxes) == 0
    flat = odd_coco(tmp_path / "d", bbox=[100, 10, 1e-6, 30])  # zero in float32
    assert flat.odd == Counter({"boxes without area left out": 1})
    single = odd_coco(tmp_path / "e", iscrowd=None)
    assert single.odd == Counter({"objects without iscrowd, treated as single objects": 1})
    crowd = odd_coco(tmp_path / "c", iscrowd=1)
    assert crowd.images[0].ignored.tolist() == [True]
    assert len(crowd.select_trainable()) == 4


def test_inconsistent_files_are_refused_by_name(tmp_path):
    write_coco(tmp_path / "b", "train2017")
    (tmp_path / "b" / "train2017" / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match=r"000000000002.jpg: no such image"):
        read_coco(str(tmp_path / "b"), "train2017")
    with pytest.raises(UserError, match=r"no .*instances_val2017.json"):
        read_coco(str(tmp_path / "b"), "val2017")
    with pytest.raises(UserError, match=r"no VOCdevkit/VOC2007 with a set test"):
        read_voc(str(tmp_path), ("2007",), "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 9}, "annotation 1 is of category 9, which the file does not list"),
        ({"category_id": None}, "annotation 1: category_id: Field required"),
        ({"category_id": [3]}, "annotation 1: category_id: Input should be a valid integer"),
        ({"image_id": 77}, "annotation 1 is of image 77, which the file does not list"),
        ({"image_id": None}, "annotation 1: image_id: Field required"),
        ({"id": 2}, "annotation 2 is there twice"),
        ({"id": None}, "annotation without id: id: Field required"),
        ({"bbox": None}, "annotation 1: bbox: Field required"),
        ({"bbox": [1, 2, 3]}, "annotation 1: bbox.3: Field required"),
        ({"bbox": [1, 2, "3", 4]}, "annotation 1: bbox.2: Input should be a valid number"),
        ({"bbox": [1, 2, float("nan"), 4]}, "annotation 1: bbox.2: .* a finite number"),
        ({"iscrowd": "no"}, "annotation 1: iscrowd: Input should be a valid integer"),
        ({"iscrowd": 2}, "annotation 1: iscrowd: Input should be less than or equal to 1"),
        ({"segmentation": None}, "annotation 1 has no segmentation, while others"),
        ({"segmentation": []}, "annotation 1 has no segmentation, while others"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 1: segmentation.* at least 6 items"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "annotation 1: .* has half a point"),
        (
            {"segmentation": {"size": [5, 5], "counts": "x"}},
            "annotation 1: its run lengths are not of 96 x 128",
        ),
    ],
)
def test_an_invalid_annotation_is_refused_by_its_number(tmp_path, change, message):
    """None removes the key."""
    with pytest.raises(UserError, match=rf"instances_train2017\.json: .*{message}"):
        odd_coco(tmp_path, **change)


IMAGE = {"id": 0, "file_name": "a.jpg", "height": 9, "width": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 3}, "not a COCO annotation file: images: Input should be a valid array"),
        ({"images": [{"id": 0}]}, "image 0: file_name: Field required"),
        ({"images": [IMAGE | {"height": 0}]}, "image 0: height: .* greater than or equal to 1"),
        ({"images": [IMAGE | {"id": 4}] * 2}, "image 4 is there twice"),
        ({"images": [IMAGE, 5]}, "image number 1: Input should be an object"),
        ({"categories": [{"id": 3, "name": "a"}] * 2}, "category 3 is there twice"),
        ({"categories": [{"id": 3}, {"id": 7}]}, "category 3: name: Field required"),
    ],
)
def test_an_invalid_list_is_refused_by_its_entry(tmp_path, change, message):
    write_coco(tmp_path, "train2017", **change)
    with pytest.raises(UserError, match=rf"instances_train2017\.json: .*{message}"):
        read_coco(str(tmp_path), "train2017")


def test_a_file_that_is_not_coco_is_refused(tmp_path):
    file = write_coco(tmp_path, "train2017")
    for content, reason in (
        ("[]", "Input should be an object"),
        ("{", "Invalid JSON"),
        ("\xff", "Invalid JSON"),
        ("3", "Input should be an object"),
    ):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(
            UserError, match=rf"train2017\.json: not a COCO annotation file: {reason}"
        ):
            read_coco(str(tmp_path), "train2017")


def test_the_digest_depends_on_everything_that_is_read(tmp_path):
    changes = [
        {},
        {"bbox": [10, 10, 30, 30]},
        {"category_id": 7},
        {"iscrowd": 1},
        {"segmentation": [[10, 10, 30, 10, 30, 30]]},
    ]
    digests = {odd_coco(tmp_path / str(k), **one).digest for k, one in enumerate(changes)}
    assert len(digests) == len(changes)
    data = odd_coco(tmp_path / "again")
    assert data.digest in digests
    hard = replace(data.images[0], ignored=~data.images[0].ignored)
    assert replace(data, images=[hard, *data.images[1:]]).digest not in digests


def test_voc_counts_from_one_and_keeps_difficult_objects_in_training(tmp_path):
    hard = voc_object("cat", difficult="<difficult>1</difficult>")
    data = read_voc(write_voc(tmp_path / "a", voc_object("dog") + hard), ("2007",), "trainval")
    (one,) = data.images
    assert one.boxes.tolist() == [[0, 10, 50, 60]] * 2
    assert one.labels.tolist() == [12, 8]
    assert one.ignored.tolist() == [False, True]
    assert one.trains.all()
    assert not data.odd
    assert not read_voc(write_voc(tmp_path / "b", ""), ("2007",), "trainval").select_trainable()
    silent = write_voc(tmp_path / "c", voc_object("dog", difficult=""))
    odd = read_voc(silent, ("2007",), "trainval").odd
    assert odd == {"objects without difficult, treated as easy": 1}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (voc_object("unicorn"), "unknown class 'unicorn'"),
        ("<object/>", "object without name"),
        ("<object><name>dog</name></object>", "object without bndbox/xmin"),
        (voc_object("dog", xmin="<xmin>nan</xmin>"), "a box of nan, 11.0, 50.0, 60.0"),
        (voc_object("dog", xmin="<xmin>one</xmin>"), "could not convert string to float: 'one'"),
        (voc_object("dog", difficult="<difficult>2</difficult>"), "difficult is '2', neither"),
        ("<object>", "mismatched tag"),
    ],
)
def test_an_invalid_voc_file_is_refused_by_name(tmp_path, objects, message):
    with pytest.raises(UserError, match=rf"000001\.xml: {message}"):
        read_voc(write_voc(tmp_path, objects), ("2007",), "trainval")


def test_an_invalid_voc_tree_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"000001\.xml: annotation without size/height"):
        read_voc(write_voc(tmp_path / "a", "", size=""), ("2007",), "trainval")
    root = write_voc(tmp_path / "b", voc_object("dog"))
    names = tmp_path / "b/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"
    names.write_text("000001\n000001\n")
    with pytest.raises(UserError, match=r"000001\.jpg: more than once in the set trainval of 2007"):
        read_voc(root, ("2007",), "trainval")
    names.write_text("000002\n")
    with pytest.raises(UserError, match=r"000002\.xml: No such file"):
        read_voc(root, ("2007",), "trainval")


def test_real_voc_tree_is_read(tmp_path):
    from tests.conftest import DATA, existing

    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2007").symlink_to(existing(DATA / "coco128_voc"))
    data = read_voc(str(tmp_path), ("2007",), "trainval")
    assert len(data.images) == 97
    assert all((p.boxes[:, 2:] > p.boxes[:, :2]).all() for p in data.images)
