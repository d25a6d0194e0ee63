"""Tests of listing: every input occurs once, with a unique key or as a reject with a reason."""

import codecs
import random
import re
from pathlib import Path

import numpy as np
import pytest

from precompute import demo_scenes
from precompute.sources import SourceImage, key_of, list_images, open_source
from precompute.sources.base import digest_key
from precompute.sources.demo import DemoScenes
from precompute.sources.trees import Files, Folder
from schemas import UserError
from schemas.sample import check_key
from schemas.storage import Store


def tree(root: Path, *files: str) -> Folder:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.encode())
    return Folder(str(root), "train", False)


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    source = tree(tmp_path, "cat/1.jpg", "ant/2.jpg", "ant/deep/3.png", "bee/4.txt")
    images, rejects = list_images(source.images())
    assert source.classes == ["ant", "bee", "cat"]
    assert images == [
        SourceImage("ant_2", "ant/2.jpg", 0),
        SourceImage("ant_deep_3", "ant/deep/3.png", 0),
        SourceImage("bee_4", "bee/4.txt", 1),
        SourceImage("cat_1", "cat/1.jpg", 2),
    ]
    assert not rejects
    assert source.read(images[1]) == b"ant/deep/3.png"


@pytest.mark.parametrize("name", ["folder", "files", "webdataset", "demo"])
def test_a_download_of_nothing_is_refused(name: str, tmp_path: Path) -> None:
    tree(tmp_path, "cat/1.jpg")
    with pytest.raises(UserError, match=f"--download fetches .*; {name} is none: leave it out"):
        open_source(name, str(tmp_path), "train", download=True)


def test_a_folder_without_classes_is_unlabeled(tmp_path: Path) -> None:
    source = tree(tmp_path, "1.jpg", "2.jpg")
    images, _ = list_images(source.images())
    assert source.classes == []
    assert [image.label for image in images] == [-1, -1]


def test_hidden_files_are_no_inputs(tmp_path: Path) -> None:
    images, rejects = list_images(tree(tmp_path, ".cache/x.jpg", "a/.DS_Store", "a/1.jpg").images())
    assert [image.key for image in images] == ["a_1"]
    assert not rejects


def test_a_file_beside_the_classes_is_rejected(tmp_path: Path) -> None:
    _, rejects = list_images(tree(tmp_path, "a/1.jpg", "list.txt").images())
    assert [(r.source, r.reason) for r in rejects] == [("list.txt", "no-class")]


def test_pictures_whose_keys_meet_are_all_kept(tmp_path: Path) -> None:
    names = ["a/b_c.jpg", "a_b/c.jpg", "a/b_c.png", "a/b/c.jpg", "a/b-c.jpg"]
    source = tree(tmp_path, *names)
    images, rejects = list_images(source.images())
    assert not rejects
    keys = {image.location: image.key for image in images}
    assert keys.keys() == set(names)
    assert len(set(keys.values())) == len(names)
    assert keys["a/b_c.jpg"] == "a_b_c"  # as in versions that dropped the others
    assert keys["a/b_c.png"] == digest_key("a_b_c", "a/b_c.png")
    for seed in range(5):  # independent of the order of listing
        shuffled = random.Random(seed).sample(images, len(images))
        again, _ = list_images(image._replace(key=key_of(image.location)) for image in shuffled)
        assert {image.location: image.key for image in again} == keys


def test_a_digest_in_a_key_takes_no_other_pictures_key(tmp_path: Path) -> None:
    """A file already has the name that the digest would give to another file."""
    odd = digest_key("a_x", "a/x.png")
    names = ["a/x.jpg", "a/x.png", f"{odd}.jpg"]
    images, rejects = list_images(SourceImage(key_of(name), name, 0) for name in names)
    keys = {image.location: image.key for image in images}
    assert (keys["a/x.jpg"], keys[f"{odd}.jpg"]) == ("a_x", odd)
    assert keys["a/x.png"] == digest_key("a_x", "a/x.png", 16)
    assert not rejects


def test_an_image_that_is_listed_twice_is_written_once() -> None:
    image = SourceImage("a", "a.jpg", 0)
    other = SourceImage("a", "a.png", 0)
    images, rejects = list_images([image, image, other, other, SourceImage("a", "a.jpg", 0)])
    assert len(images) == 2
    assert [reject.reason for reject in rejects] == ["duplicate"] * 3


@pytest.mark.parametrize(
    "location",
    ["a/b.jpg", "a/ü.jpg", "a b/c.jpg", "a.b/c.tar.gz", "x" * 300 + ".jpg", "图/猫.jpg", ".../a"],
)
def test_every_path_gives_a_key_that_can_be_stored(location: str) -> None:
    check_key(key_of(location))


def test_replaced_characters_do_not_make_keys_collide() -> None:
    names = ["图.jpg", "猫.jpg", "a b.jpg", "a.b.jpg", "x" * 300 + "1.jpg", "x" * 300 + "2.jpg"]
    assert len({key_of(name) for name in names}) == len(names)
    assert key_of("n01440764/n01440764_10026.JPEG") == "n01440764_n01440764_10026"


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Folder(str(tmp_path / "absent"), "train", False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        Folder(str(tmp_path / "file"), "train", False)


def test_linked_folders_are_followed_and_circles_refused(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "1.jpg")
    tree(tmp_path / "root", "ant/2.jpg")
    (tmp_path / "root" / "bee").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "ant" / "dangling.jpg").symlink_to("nowhere")
    images, _ = list_images(Folder(str(tmp_path / "root"), "train", False).images())
    assert [image.location for image in images] == ["ant/2.jpg", "ant/dangling.jpg", "bee/1.jpg"]
    (tmp_path / "root" / "ant" / "circle").symlink_to(tmp_path / "root" / "ant")
    with pytest.raises(UserError, match="leads back to a folder"):
        list_images(Folder(str(tmp_path / "root"), "train", False).images())


def test_a_root_may_be_a_url() -> None:
    store = Store("memory://sources/root")
    store.write("ant/1.jpg", b"one")
    source = Folder("memory://sources/root/", "train", False)
    images, _ = list_images(source.images())
    assert images == [SourceImage("ant_1", "ant/1.jpg", 0)]
    assert source.read(images[0]) == b"one"


def test_demo_scenes_follow_from_split_and_index() -> None:
    first, again, other = (
        demo_scenes.draw_scene(3, "train"),
        demo_scenes.draw_scene(3, "train"),
        demo_scenes.draw_scene(3, "val"),
    )
    assert (first.image == again.image).all()
    assert first.image.shape != other.image.shape or (first.image != other.image).any()
    assert first.label == other.label == demo_scenes.choose_label(3)


def test_demo_objects_are_where_the_mask_says() -> None:
    for index in range(2 * len(demo_scenes.CLASSES)):
        scene = demo_scenes.draw_scene(index, "train")
        assert scene.mask.shape == scene.image.shape[:2]
        assert 0.01 < scene.mask.mean() < 0.5
        inside, outside = (scene.image[m].mean(axis=0) for m in (scene.mask, ~scene.mask))
        spread = scene.image[scene.mask].std()
        assert abs(inside - outside).max() > 2 or spread > 2


def test_demo_source_lists_every_class_alike() -> None:
    images, rejects = list_images(DemoScenes("", "train", False).images())
    assert len(images) == demo_scenes.SCENES
    assert not rejects
    assert len(set(np.bincount([image.label for image in images]))) == 1
    assert all(re.fullmatch(r"scene-\d{5}", image.key) for image in images)


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(codecs.BOM_UTF8 + b"a.jpg\r\n\r\nb/c.jpg\r\n")
    images = Files(str(tmp_path / "list.txt"), "train", False).images()
    assert [image.location for image in images] == ["a.jpg", "b/c.jpg"]
