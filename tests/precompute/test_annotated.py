"""Tests of the VOC and COCO sources."""

import json
from pathlib import Path

import pytest

from precompute.sources import list_images, open_source
from schemas import UserError
from tests.conftest import DATA, existing
from tests.precompute.conftest import listed, write


def voc_tree(root: Path, year: str, names: dict[str, list[tuple[str, int]]]) -> None:
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name, objects in names.items():
        write(folder / "JPEGImages" / f"{name}.jpg")
        entries = "".join(
            f"<object><name>{kind}</name><difficult>{hard}</difficult></object>"
            for kind, hard in objects
        )
        write(
            folder / "Annotations" / f"{name}.xml", f"<annotation>{entries}</annotation>".encode()
        )
    write(folder / "ImageSets/Main/trainval.txt", "\n".join(names).encode())


def test_voc(tmp_path: Path) -> None:
    voc_tree(tmp_path, "2007", {"000005": [("chair", 0), ("chair", 1), ("sofa", 1)]})
    voc_tree(tmp_path, "2012", {"2008_000002": [("tvmonitor", 0), ("dog", 0)], "2008_000003": []})
    source = open_source("voc", str(tmp_path), "07+12-trainval", False)
    assert listed(source) == {
        "VOC2007/JPEGImages/000005.jpg": ("VOC2007_000005", -1),
        "VOC2012/JPEGImages/2008_000002.jpg": ("VOC2012_2008_000002", -1),
        "VOC2012/JPEGImages/2008_000003.jpg": ("VOC2012_2008_000003", -1),
    }
    kept = [
        json.loads(source.members(image)["labels.json"])
        for image in list_images(source.images())[0]
    ]
    assert kept == [
        {"labels": [8], "difficult": [17]},
        {"labels": [11, 19], "difficult": []},
        {"labels": [], "difficult": []},
    ]
    assert len(listed(open_source("voc", str(tmp_path), "12-trainval", False))) == 2
    assert len(listed(open_source("voc", str(tmp_path), "trainval", False))) == 3
    for split in ("12-test", "06-train", "07+12-all"):
        with pytest.raises(UserError, match="voc has no split"):
            open_source("voc", str(tmp_path), split, False)
    with pytest.raises(UserError, match="no voc 2007 as torchvision lays it out"):
        open_source("voc", str(tmp_path), "07-train", False)
    broken = tmp_path / "VOCdevkit/VOC2007/Annotations/000005.xml"
    broken.write_text("<annotation><object><name>unicorn</name></object></annotation>")
    image = list_images(open_source("voc", str(tmp_path), "07-trainval", False).images())[0][0]
    with pytest.raises(ValueError, match=r"000005\.xml: not an annotation of VOC.*unicorn"):
        source.members(image)


def test_coco(tmp_path: Path) -> None:
    for number in (9, 25):
        write(tmp_path / "train2017" / f"{number:012d}.jpg")
    annotations = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (9, 25)],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [
            {"id": 7, "image_id": 9, "category_id": 90, "bbox": [1.5, 2, 3, 4], "iscrowd": 0}
        ],
    }
    plain = open_source("coco", str(tmp_path), "train", False)
    assert listed(plain)["000000000009.jpg"] == ("000000000009", -1)
    assert plain.members(next(iter(list_images(plain.images())[0]))) == {}
    with pytest.raises(UserError, match=r"instances_train2017\.json: no such file; DATASET=coco"):
        open_source("coco-instances", str(tmp_path), "train", False)
    write(tmp_path / "annotations/instances_train2017.json", json.dumps(annotations).encode())
    source = open_source("coco-instances", str(tmp_path), "train", False)
    images, _ = list_images(source.images())
    assert source.classes == ["person", "toothbrush"]
    kept = [json.loads(source.members(image)["instances.json"]) for image in images]
    assert kept == [annotations["annotations"], []]


def test_real_coco_and_voc_pictures() -> None:
    root = existing(DATA / "coco128")
    source = open_source("coco-instances", str(root), "train", False)
    images, rejects = list_images(source.images())
    assert (len(images), len(rejects)) == (128, 0)
    assert any(json.loads(source.members(image)["instances.json"]) for image in images)
    assert len(list_images(open_source("coco", str(root), "val", False).images())[0]) == 128


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []},
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": [{"id": 1}]},
        {"images": [{"id": 1}], "annotations": [], "categories": []},
    ],
)
def test_a_file_that_is_not_cocos_is_refused_in_one_line(content: object, tmp_path: Path) -> None:
    write(tmp_path / "val2017/a.jpg")
    write(tmp_path / "annotations/instances_val2017.json", json.dumps(content).encode())
    source = open_source("coco-instances", str(tmp_path), "val", False)
    with pytest.raises(UserError, match=r"no coco as .*corrupted.*; get it from cocodataset\.org"):
        list_images(source.images())
