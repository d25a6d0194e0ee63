"""Tests of OUT among the inputs, unusual trees, hanging reads and keys that clash on --extend."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precompute import guard, progress
from precompute.__main__ import count_classes
from precompute.estimators import SpectralOptions
from precompute.extend import select_new
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.progress import describe_stall
from precompute.reads import PendingReads
from precompute.reencode import Resize
from precompute.shard_builder import ShardBuilder
from precompute.sources import SourceImage, list_images, open_source
from precompute.sources.base import digest_key
from precompute.sources.imagenet import CLASSES
from precompute.sources.trees import Folder
from schemas import ShardDataset, UserError
from schemas.storage import Store
from schemas.tables import CARD
from tests.conftest import encode, noise
from tests.precompute.conftest import build_folder, run_here, write


def refused(out: object, root: object) -> bool:
    try:
        guard.refuse_own_inputs(str(out), str(root))
        guard.refuse_linked_inputs(str(out), linked(str(root)).linked_folders())
    except UserError:
        return True
    return False


def linked(root: str) -> Folder:
    source = Folder.__new__(Folder)
    source.store = Store(root)
    if source.store.is_local and Path(root).is_dir():
        list(source.store.walk())
    return source


def test_an_output_among_its_inputs_is_refused_by_its_real_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("real/a", "elsewhere/b", "out/shards", "apart"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("real")
    Path("real/b").symlink_to(tmp_path / "elsewhere/b")
    Path("into").symlink_to("real/a")
    assert refused("real/out", "real")
    assert refused("real/out", "link")
    assert refused("link/out", "real")
    assert refused("link/../real/./out", tmp_path / "real")
    assert refused("into/out", "real")
    assert refused("real", "link")
    assert refused(f"file://{tmp_path}/real/out", "link")
    assert refused("elsewhere/b/out", "real")  # through the link inside ROOT
    assert refused("elsewhere/b", "real")
    assert refused("out", "out/shards")  # a dataset's tars rebuilt in place
    assert refused("out", "out/shards/part")
    assert refused("real/out", "real/**/*.tar")
    assert refused("link/out", "real/*/*/*.tar")
    for out, root in [
        ("apart", "real"),
        ("real-2/out", "real"),
        ("elsewhere", "real"),
        (".", "real"),
        ("real/out", "real/**/*.jpg"),
        ("real/out", "real/*.tar"),
        (f"memory://{tmp_path}/real/out", "real"),
    ]:
        assert not refused(out, root), (out, root)


def test_outputs_in_stores_are_compared_as_stores_name_them() -> None:
    assert refused("memory://b/root/out", "memory://b/root/")
    assert refused("memory://b/root//out/", "memory://b//root")
    assert refused("memory://b/root", "memory://b/root/")
    assert not refused("memory://b/root-2", "memory://b/root")


def test_a_bind_mount_is_the_folder_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"30 22 8:1 {tmp_path}/real/a\\040b {tmp_path}/mounted rw - ext4 /dev/sda1 rw\n"
        f"31 22 0:50 / {tmp_path}/other rw - tmpfs tmpfs rw\n"
    )
    monkeypatch.setattr(guard, "MOUNTS", str(mounts))
    for folder in ("real/a b", "mounted", "other"):
        (tmp_path / folder).mkdir(parents=True)
    assert refused(tmp_path / "mounted" / "out", tmp_path / "real")
    assert refused(tmp_path / "mounted" / "out", tmp_path / "real" / "a b")
    assert refused(tmp_path / "real" / "a b" / "out", tmp_path / "mounted")
    assert not refused(tmp_path / "other" / "out", tmp_path / "real")
    monkeypatch.setattr(guard, "MOUNTS", str(tmp_path / "absent"))
    assert refused(tmp_path / "real" / "out", tmp_path / "real")


def test_an_output_in_a_linked_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path / "real/a/1.jpg")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(UserError, match="lies inside"):
        run_here("--dataset", "folder", "--root", tmp_path / "link", "--out", tmp_path / "real/out")
    assert not (tmp_path / "real" / "out").exists()


# unusual trees


@pytest.mark.parametrize("dataset", ["caltech101", "flowers102", "stl10", "cifar10", "voc", "coco"])
def test_a_wrong_root_stays_as_it_is_and_is_named_in_our_words(
    dataset: str, tmp_path: Path
) -> None:
    split = "test" if dataset == "voc" else "train"
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError) as error:
            open_source(dataset, str(root), split, False)
        message = str(error.value)
        assert str(root) in message
        assert "missing" in message or "no such folder" in message
        assert "You can use download=True" not in message
    assert not list(tmp_path.iterdir())


def test_a_pipe_in_place_of_a_list_is_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "VOCdevkit/VOC2007"
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    os.mkfifo(folder / "ImageSets/Main/train.txt")
    with pytest.raises(UserError, match=r"train\.txt is a named pipe"):
        open_source("voc", str(tmp_path), "07-train", False)


def test_droppings_shift_no_picture_and_no_class(tmp_path: Path) -> None:
    base = tmp_path / "caltech101/101_ObjectCategories"
    for number in range(1, 34):
        write(base / "accordion" / f"image_{number:04d}.jpg")
    plain = list_images(open_source("caltech101", str(tmp_path), "train", False).images())[0]
    for name in (".DS_Store", "__MACOSX/accordion/._image_0001.jpg", "accordion/._image_0001.jpg"):
        write(base / name, b"Mac OS X")
    write(base / "accordion" / "Thumbs.db", b"Windows")
    source = open_source("caltech101", str(tmp_path), "train", False)
    images, rejects = list_images(source.images())
    assert images == plain
    assert source.classes == ["accordion"]
    assert [(r.source, r.reason) for r in rejects] == [("accordion/Thumbs.db", "no-image")]


@pytest.mark.parametrize("above", ["", "imagenette2/"])
def test_a_root_above_the_splits_is_noticed(above: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / f"{above}{split}" / "cat" / "1.jpg")
    with pytest.raises(UserError, match=rf"{above}train and {above}val, which are splits.*/train"):
        Folder(str(tmp_path), "train", False)
    write(tmp_path / f"{above}car" / "1.jpg")  # `train` is then a class
    write(tmp_path / "other" / "1.jpg")
    assert Folder(str(tmp_path), "train", False).classes


def test_what_was_listed_is_said(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cat", "dog"):
        (tmp_path / name).mkdir()
    write(tmp_path / "bee" / "1.jpg")
    source = Folder(str(tmp_path), "train", False)
    images, _ = list_images(source.images())
    labels = Counter(image.label for image in images)
    assert count_classes(labels, source) == "1 image in 4 classes, 3 without images (ant, cat, dog)"


@pytest.mark.parametrize("label", [4, -2, np.int64(1), "1"])
def test_a_label_that_is_no_class_is_refused_before_the_work(label: Any, tmp_path: Path) -> None:
    """A custom source may give it; `verify` calls it damage, and a loss on a GPU fails on it."""
    (tmp_path / "ant").mkdir()
    source = Folder(str(tmp_path), "train", False)
    count_classes(Counter([0, -1]), source)
    with pytest.raises(UserError, match=f"the label {re.escape(repr(label))}, but has 1 class: "):
        count_classes(Counter([0, label]), source)


WNIDS = [f"n{n:08d}" for n in range(CLASSES)]


def kaggle(root: Path) -> Path:
    base = root / "ILSVRC/Data/CLS-LOC"
    for wnid in WNIDS:
        (base / "train" / wnid).mkdir(parents=True)
    write(base / "train" / WNIDS[3] / f"{WNIDS[3]}_1.JPEG")
    rows = [f"ILSVRC2012_val_{n:08d},{wnid} 1 2 3 4" for n, wnid in enumerate(WNIDS)]
    csv = "\n".join(["ImageId,PredictionString", *rows])
    (root / "LOC_val_solution.csv").write_text(csv)
    for number in (5, 7, 5000):
        write(base / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return base


def test_imagenet_as_kaggle_lays_it_out(tmp_path: Path) -> None:
    base = kaggle(tmp_path)
    for root in (tmp_path, tmp_path / "ILSVRC", base):
        source = open_source("imagenet", str(root), "train", False)
        assert [image.label for image in list_images(source.images())[0]] == [3]
        source = open_source("imagenet", str(root), "val", False)
        images, rejects = list_images(source.images())
        assert source.classes == WNIDS
        assert {image.location: image.label for image in images} == {
            "ILSVRC2012_val_00000005.JPEG": 5,
            "ILSVRC2012_val_00000007.JPEG": 7,
        }
        assert [reject.reason for reject in rejects] == ["no-class"]
        assert source.read(images[0])
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"not in class folders .*LOC_val_solution\.csv in "):
        open_source("imagenet", str(tmp_path), "val", False)


def test_imagenet_that_is_not_whole(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in WNIDS:
            (tmp_path / split / wnid).mkdir(parents=True)
    (tmp_path / "train" / "new folder").mkdir()
    write(tmp_path / "train" / WNIDS[0] / "1.JPEG")
    source = open_source("imagenet", str(tmp_path), "train", False)
    _, rejects = list_images(source.images())
    assert [(r.source, r.reason) for r in rejects] == [("new folder", "no-class")]
    (tmp_path / "val" / WNIDS[7]).rmdir()
    with pytest.raises(UserError, match=f"999 class folders.*train also has {WNIDS[7]}"):
        open_source("imagenet", str(tmp_path), "val", False)


def test_imagenet_that_is_not_unpacked_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"looked for .*/train/, .*ILSVRC/Data/CLS-LOC/train/"):
        open_source("imagenet", str(tmp_path), "train", False)
    write(tmp_path / "train" / "n01440764.tar", b"tar")
    write(tmp_path / "train" / "n01443537.tar", b"tar")
    with pytest.raises(UserError, match=r"2 tars that are not unpacked \(n01440764\.tar \.\.\.\)"):
        open_source("imagenet100", str(tmp_path), "train", False)


# reads that hang


def test_a_read_that_hangs_is_named(tmp_path: Path) -> None:
    reads, hanging = PendingReads(), threading.Event()

    def read() -> None:
        with reads.begin(os.fsdecode(b"a/h\xe4ngt.jpg")):
            hanging.wait(20)

    thread = threading.Thread(target=read)
    thread.start()
    with reads.begin("a/done.jpg"):
        pass
    time.sleep(0.05)
    slow = reads.slow(0.01)
    assert list(slow) == [r"$'a/h\xe4ngt.jpg'"]
    assert not reads.slow(10)
    assert f"these reads do not end: {next(iter(slow))} (for 0 s)" in describe_stall({0: 1.0}, slow)
    hanging.set()
    thread.join()
    assert not reads.slow(0)


def test_a_listing_that_hangs_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.02)

    def images() -> Iterator[SourceImage]:
        yield SourceImage("a", "a/last.jpg", 0)
        time.sleep(0.5)

    assert len(list(progress.show_listing(images()))) == 1
    assert "listing is stuck after a/last.jpg" in capsys.readouterr().err


# clashing keys when a dataset is extended


def test_pictures_whose_keys_meet_are_written_in_one_run_or_in_two(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, name in enumerate(["a/b_c.jpg", "a_b/c.jpg", "a/x.jpg", "a/x.png"]):
        write(root / name, encode(noise(number), "PNG" if name.endswith("png") else "JPEG"))
    whole = build_folder(root, tmp_path / "whole")
    assert len(whole) == 4
    keys = dict(zip(*(whole.samples[c].to_pylist() for c in ("source", "key")), strict=True))
    assert (keys["a/b_c.jpg"], keys["a/x.jpg"]) == ("a_b_c", "a_x")

    write(root / "a/b/c.webp", encode(noise(9), "WEBP"))
    write(root / "a/b_c.gif", encode(noise(8), "GIF"))  # sorts before the owner of the key
    images, rejects = list_images(Folder(str(root), "train", False).images())
    for _ in range(2):
        _, new, _ = select_new(str(tmp_path / "whole"), images, rejects, ["a", "a_b"])
        assert {image.location for image in new} == {"a/b/c.webp", "a/b_c.gif"}
        assert not {image.key for image in new} & set(keys.values())
        assert len({image.key for image in new}) == 2


def test_a_new_key_is_not_one_of_an_image_that_has_left_the_source(tmp_path: Path) -> None:
    root = tmp_path / "root"
    shorter = digest_key("a_x", "a/x.png", 8)
    left = [root / "a" / "x.jpg", root / "a" / f"{shorter.removeprefix('a_')}.jpg"]
    for number, path in enumerate(left):
        write(path, encode(noise(number)))
    dataset = build_folder(root, tmp_path / "out")
    assert set(dataset.samples["key"].to_pylist()) == {"a_x", shorter}
    for path in left:
        path.unlink()
    write(root / "a" / "x.png", encode(noise(2), "PNG"))
    write(root / "a" / "y.png", encode(noise(3), "PNG"))
    images, rejects = list_images(Folder(str(root), "train", False).images())
    _, new, _ = select_new(str(tmp_path / "out"), images, rejects, ["a"])
    keys = {image.location: image.key for image in new}
    assert keys == {"a/x.png": digest_key("a_x", "a/x.png", 16), "a/y.png": "a_y"}


def test_an_extension_that_stopped_before_the_card_is_completed(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    write(root / "a" / "0.jpg", encode(noise(0)))
    before = build_folder(root, out).card
    write(root / "a" / "1.jpg", encode(noise(1)))
    source = Folder(str(root), "train", False)

    def extend() -> Job:
        images, rejects = list_images(source.images())
        card, new, rejects = select_new(str(out), images, rejects, ["a"])
        plan = make_plan(new, seed=0, shard_samples=1000)
        options = SpectralOptions()
        return Job("folder", "train", source, plan, rejects, options, 0, str(out), 32, before=card)

    job, store = extend(), Store(out)
    settings = job.settings(None)
    builder = ShardBuilder(source, SpectralOptions().build(), store, 32, Resize(), settings)
    builder.build(1, job.plan.shards[0])
    digest = job.finish(store, settings, saliency_side=28).digest
    store.write(CARD, before.to_json())
    with pytest.raises(
        UserError, match=r"not finished: its dataset\.json counts 1 sample in 1 shard,"
    ):
        ShardDataset.open(out)
    run_job(extend(), Resources())  # starts no Ray, because no shard is missing
    dataset = ShardDataset.open(out)
    assert (len(dataset), dataset.digest, dataset.verify().clean) == (2, digest, True)
