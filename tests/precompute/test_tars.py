"""Tests of existing tars: order of members, names, several images, all kinds of labels."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from precompute.__main__ import explain_no_images
from precompute.sources import SourceImage, list_images, open_source
from precompute.sources.labels import LabelReader, name_classes
from precompute.sources.tar_members import TarMember
from precompute.sources.webdataset import WebDatasetShards
from schemas import UserError
from schemas.storage import Store
from schemas.tables import Reject
from tests.conftest import encode, noise
from tests.precompute.conftest import run_here

JPEG, PNG = encode(noise(0)), encode(noise(1), "PNG")
Members = list[tuple[str, bytes]]


def listed(root: Path, members: Members, **options: object) -> tuple[list, dict[str, Reject], list]:
    """Return the images of a tar with these members, the rejects by source, and the classes."""
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "0.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    source = open_source("webdataset", str(root), "train", False, **options)
    images, rejects = list_images(source.images())
    for image in images:
        assert source.read(image) in (JPEG, PNG)
        source.members(image)
    return images, {reject.source: reject for reject in rejects}, list(source.classes)


def labels(images: list[SourceImage]) -> dict[str, int]:
    return {image.location.removeprefix("0.tar/"): image.label for image in images}


def test_members_need_not_lie_side_by_side(tmp_path: Path) -> None:
    names = [f"{i:04d}" for i in range(6)]
    members = [(f"{n}.jpg", JPEG) for n in names]
    members += [(f"{n}.cls", str(i % 3).encode()) for i, n in enumerate(names)]
    images, rejects, classes = listed(tmp_path, members)
    assert labels(images) == {n: i % 3 for i, n in enumerate(names)}
    assert (rejects, classes) == ({}, ["0", "1", "2"])


def test_every_member_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}.{extension}" for number in range(3) for extension in ("jpg", "txt")]
    contents = {name: JPEG if name.endswith("jpg") else b"text" for name in names}
    images, _, _ = listed(tmp_path, list(contents.items()))
    source = open_source("webdataset", str(tmp_path), "train", False)
    reads: list[int | None] = []
    read = Store.read

    def count(store: Store, name: str, start: int | None = None, end: int | None = None) -> bytes:
        reads.append(start)
        return read(store, name, start, end)

    monkeypatch.setattr(Store, "read", count)
    for image in images:
        assert source.read(image) == JPEG
        assert source.members(image) == {"txt": b"text"}
    assert len(reads) == len(set(reads)) == 6


def test_a_name_that_comes_again_is_another_picture(tmp_path: Path) -> None:
    """Tars that were appended to each other may repeat names."""
    images, rejects, _ = listed(
        tmp_path, [("a.jpg", JPEG), ("a.cls", b"0"), ("a.jpg", PNG), ("a.cls", b"1")]
    )
    assert labels(images) == {"a": 0, "a (2)": 1}
    assert len({image.key for image in images}) == 2
    assert not rejects


@pytest.mark.parametrize(
    ("contents", "expected", "rejected"),
    [
        pytest.param([b"123456789", b"1", b"1", b"0"], [None, 1, 1, 0], 1, id="one identifier"),
        pytest.param([b"dog", b"cat", b"dog", b"emu"], [1, 0, 1, 2], 0, id="text"),
        pytest.param([b"dog", b"1", b"0", b"1"], [None, 1, 0, 1], 1, id="text among digits"),
        pytest.param([b"3\n", b" 2", b"\xef\xbb\xbf1", b"0\0"], [3, 2, 1, 0], 0, id="blanks"),
        pytest.param([b"-1", b"1", b"-1", b"0"], [-1, 1, -1, 0], 0, id="some without a label"),
        pytest.param([b"-7", b"1.5", b"", b"0"], [None, None, None, 0], 3, id="no numbers"),
        pytest.param([b"h\xfcnd", b"cat", b"cat", b"cat"], [1, 0, 0, 0], 0, id="text in Latin-1"),
        pytest.param([b"x" * 5000, b"cat", b"cat", b"cat"], [None, 0, 0, 0], 1, id="no label"),
    ],
)
def test_labels_of_cls(tmp_path: Path, contents: list, expected: list, rejected: int) -> None:
    members: Members = []
    for number, content in enumerate(contents):
        members += [(f"{number}.jpg", JPEG), (f"{number}.cls", content)]
    images, rejects, _ = listed(tmp_path, members)
    wanted = {str(i): label for i, label in enumerate(expected) if label is not None}
    assert labels(images) == wanted
    assert [reject.reason for reject in rejects.values()] == ["bad-label"] * rejected


def test_identifiers_are_classes_where_the_user_says_so(tmp_path: Path) -> None:
    members = [("0.jpg", JPEG), ("0.cls", b"987654321"), ("1.jpg", JPEG), ("1.cls", b"123456789")]
    images, rejects, classes = listed(tmp_path, members, label_text=True)
    assert (labels(images), classes) == ({"0": 1, "1": 0}, ["123456789", "987654321"])
    _, rejects, classes = listed(tmp_path, members)
    assert classes == []
    assert "--label-text" in rejects["0.tar/0"].detail


def test_many_classes_are_no_identifiers() -> None:
    """Face datasets may have 360,000 numbered identities; one number far above is refused."""
    reader = LabelReader("", False)
    numbers, classes, bad = name_classes(map(str, [*range(360_000), 999_999_999]), reader)
    assert len(classes) == 360_000
    assert bad.keys() == {"999999999"}
    assert numbers["359999"] == 359_999


@pytest.mark.parametrize(
    ("content", "options", "label"),
    [
        ({"label": 2}, {}, 2),
        ({"caption": "a dog", "cls": "1", "url": "x"}, {}, 1),
        ({"label": 1.0}, {}, 1),
        ({"label": None}, {}, -1),
        ({"caption": "a dog", "key": "000", "status": "success"}, {}, -1),
        ({"meta": {"id": 4}}, {"label_member": "json:meta.id"}, 4),
        ({"meta": {"id": 4}}, {"label_member": "json.meta.id"}, 4),
        ({"label": 4}, {"label_member": "json"}, 4),
        ({"label": 4}, {"label_member": "none"}, -1),
        ({"label": [1, 2]}, {}, "not a single label"),
        ({"label": True}, {}, "not a single label"),
        ({"caption": "a"}, {"label_member": "json"}, "has no label but caption"),
        ({"label": 4}, {"label_member": "json:other"}, "has no 'other'"),
        ({"label": 4}, {"label_member": "txt"}, "it has no member 'txt'"),
        ([1, 2], {}, -1),
    ],
)
def test_labels_of_json(tmp_path: Path, content: object, options: dict, label: object) -> None:
    members = [("a.jpg", JPEG), ("a.json", json.dumps(content).encode())]
    images, rejects, _ = listed(tmp_path, members, **options)
    if isinstance(label, int):
        assert labels(images) == {"a": label}
        assert not rejects
    else:
        assert str(label) in rejects["0.tar/a"].detail


def test_the_label_may_be_named(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.txt", b"tabby cat"), ("a.cls", b"7")]
    images, _, classes = listed(tmp_path, members, label_member="txt")
    assert (labels(images), classes) == ({"a": 0}, ["tabby cat"])
    source = open_source("webdataset", str(tmp_path), "train", False, label_member="txt")
    image = next(entry for entry in source.images() if isinstance(entry, SourceImage))
    assert source.members(image) == {"txt": b"tabby cat", "source.cls": b"7"}


@pytest.mark.parametrize("name", ["label", "class.txt", "labels.npy"])
def test_a_label_of_another_name_is_not_lost_without_a_word(tmp_path: Path, name: str) -> None:
    members = [("a.jpg", JPEG), (f"a.{name}", b"1")]
    _, rejects, _ = listed(tmp_path, members)
    assert f"choose --label-member {name}, or none" in rejects["0.tar/a"].detail
    assert labels(listed(tmp_path, members, label_member="none")[0]) == {"a": -1}


@pytest.mark.parametrize(
    ("names", "option", "reason"),
    [
        (["input.jpg"], "", ""),
        (["INPUT.JPG"], "", ""),
        (["jpg", "depth.png"], "", ""),
        (["jpg", "png"], "", "several-images"),
        (["jpg", "png"], "png", ""),
        (["left.jpg", "right.jpg"], "", "several-images"),
        (["left.jpg", "right.jpg"], "right.jpg", ""),
        (["left.jpg", "right.jpg"], "middle.jpg", "no-image"),
        (["saliency.png"], "", "no-image"),
        (["jxl"], "", ""),
    ],
)
def test_the_image_among_several(tmp_path: Path, names: list, option: str, reason: str) -> None:
    members: Members = [(f"a.{name}", JPEG) for name in names] + [("a.cls", b"0")]
    images, rejects, _ = listed(tmp_path, members, image_member=option)
    assert [reject.reason for reject in rejects.values()] == ([reason] if reason else [])
    assert len(images) == (not reason)
    for reject in rejects.values():
        assert ", ".join([*names, "cls"]) in reject.detail


def test_keys_with_dots(tmp_path: Path) -> None:
    members: Members = []
    for number in range(20):
        members += [(f"v1.{number:04d}.jpg", JPEG), (f"v1.{number:04d}.cls", b"1")]
    _, rejects, _ = listed(tmp_path, members)
    detail = rejects["0.tar/v1"].detail
    assert "--keys-with-dots" in detail
    assert "0000.jpg, 0000.cls" in detail
    assert "and 32 more" in detail
    images, rejects, _ = listed(tmp_path, members, keys_with_dots=True)
    assert (len(images), len({image.key for image in images}), rejects) == (20, 20, {})


def test_links_devices_and_what_belongs_to_no_sample_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, kind in (
            *(("soft", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("pipe", tarfile.FIFOTYPE)),
            *(("device", tarfile.CHRTYPE), ("good", tarfile.REGTYPE)),
        ):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(JPEG) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(JPEG))
        archive.addfile(tarfile.TarInfo("README"))
        archive.addfile(tarfile.TarInfo("._good.jpg"))
        label = tarfile.TarInfo("good.cls")
        label.type, label.linkname = tarfile.SYMTYPE, "other.cls"
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        info = tarfile.TarInfo("good.jpg")
        info.size = len(JPEG)
        archive.addfile(info, io.BytesIO(JPEG))
        label = tarfile.TarInfo("good.cls")
        label.type, label.linkname = tarfile.LNKTYPE, "other.cls"
        archive.addfile(label)
    source = open_source("webdataset", str(tmp_path), "train", False)
    images, rejects = list_images(source.images())
    assert [image.location for image in images] == ["0.tar/good"]
    assert {reject.source: reject.reason for reject in rejects} == {
        **{f"0.tar/{name}": "not-a-file" for name in ("soft", "hard", "pipe", "device")},
        "0.tar/README (no extension)": "no-image",
        "1.tar/good": "not-a-file",  # the label would be lost
    }


def test_a_pipe_among_the_tars_and_signs_of_a_glob_in_a_name(tmp_path: Path) -> None:
    root = tmp_path / "tars[1]"
    images, _, _ = listed(root, [("a.jpg", JPEG)])
    os.mkfifo(root / "1.tar")
    source = open_source("webdataset", str(root), "train", False)
    again, rejects = list_images(source.images())
    assert again == images
    assert [(reject.source, reject.reason) for reject in rejects] == [("1.tar", "not-a-file")]


def test_plans_of_tars_stay_what_they_were(tmp_path: Path) -> None:
    """The rows of a plan must not change, so that datasets begun by earlier versions resume."""
    images, _, _ = listed(tmp_path, [("a/b.jpg", JPEG), ("a/b.cls", b"1"), ("a/b.txt", b"x")])
    annotation = f'[["jpg", 512, {len(JPEG)}], ["txt", '
    assert images[0][:3] == ("0_a_b", "0.tar/a/b", 1)
    assert images[0].annotation.startswith(annotation)


def test_what_is_rejected_while_listing_is_told(tmp_path: Path) -> None:
    members = [("a.jpg", JPEG), ("a.png", PNG), ("b.txt", b""), ("c.jpg", JPEG), ("c.png", PNG)]
    listed(tmp_path / "root", members)
    arguments = ["--dataset", "webdataset", "--root", tmp_path / "root", "--out", tmp_path / "out"]
    with pytest.raises(UserError) as error:
        run_here(*arguments)
    assert "all 3 inputs are rejected: 2 several-images, first 0.tar/a: " in str(error.value)
    assert "its members: jpg, png" in str(error.value)
    assert "1 no-image, first 0.tar/b" in str(error.value)
    with pytest.raises(UserError, match="--image-member is an option of DATASET=webdataset"):
        run_here("--dataset", "demo", "--out", tmp_path / "out", "--image-member", "jpg")
    assert "no images in it" in explain_no_images("root", [])


def test_many_members_of_one_name_are_grouped_in_linear_time() -> None:
    """Comparing each with all others took minutes for a tar of 100,000."""
    source = object.__new__(WebDatasetShards)
    source.keys_with_dots = False

    def count_calls(count: int) -> int:
        """Group `count` members in both ways; return the number of calls that this takes."""
        one = [TarMember(f"photo.{i}.jpg", i, 1) for i in range(count)]
        many = [TarMember("photo.jpg", i, 1) for i in range(count)]
        calls = 0

        def note(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(note)
        try:
            [group] = source.groups(one).values()
            groups = source.groups(many)
        finally:
            sys.setprofile(None)
        assert len(group.members) == len(groups) == count
        assert list(groups)[:3] == ["photo", "photo (2)", "photo (3)"]
        return calls

    assert count_calls(2000) < 2.1 * count_calls(1000)  # 4 times as many if each meets all others


def test_a_repeated_name_gets_a_number_that_no_other_name_has(tmp_path: Path) -> None:
    names = ["a (2).jpg", "a (4).jpg", *["a.jpg"] * 4]
    images, rejects, _ = listed(tmp_path, [(name, JPEG) for name in names])
    assert not rejects
    assert labels(images).keys() == {"a", "a (2)", "a (3)", "a (4)", "a (5)", "a (6)"}


def build_tar() -> bytearray:
    """Return a tar of six images of one block, so that a member begins at every 1024th byte."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(6):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 512
            archive.addfile(info, io.BytesIO(bytes(512)))
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "after byte 3072 are no more members, but other content"),
        ("zeros", "after byte 3072 are no more members, but other content"),
        ("joined", "after byte 6144 .* several tars are joined"),
        ("cut at 3072", r"its end mark, .* is missing at byte 3072, .* `truncate -s \+1024`"),
        ("cut at 3172", "cut short inside a header at byte 3072"),
        ("cut at 3672", "unexpected end of data"),
    ],
)
def test_no_sample_behind_a_damaged_header_is_lost_silently(
    tmp_path: Path, damage: str, message: str
) -> None:
    tar = build_tar()
    if damage == "flip":
        tar[3072 + 10] ^= 0xFF
    elif damage == "zeros":
        tar[3072:3584] = bytes(512)
    elif damage == "joined":
        tar *= 2
    else:
        del tar[int(damage.removeprefix("cut at ")) :]
    (tmp_path / "0.tar").write_bytes(tar)
    source = open_source("webdataset", str(tmp_path), "train", False)
    with pytest.raises(UserError, match=f"0.tar: not a whole, uncompressed tar .*{message}"):
        list(source.images())


@pytest.mark.parametrize("zeros", [512, 1024, 10240])
def test_a_tar_may_end_with_any_number_of_zero_blocks(tmp_path: Path, zeros: int) -> None:
    (tmp_path / "0.tar").write_bytes(build_tar()[: 6 * 1024] + bytes(zeros))
    source = open_source("webdataset", str(tmp_path), "train", False)
    assert len(list(source.images())) == 6
