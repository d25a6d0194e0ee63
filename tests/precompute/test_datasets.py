"""Tests of each source on a tree with the dataset's real layout and a few generated images."""

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from precompute.sources import Source, SourceImage, list_images, open_source
from precompute.sources.base import LOCAL_READERS, REMOTE_READERS, count_readers
from schemas import UserError
from tests.conftest import DATA, encode, existing, noise
from tests.precompute.conftest import listed, write

SHARED = DATA.parent


def imagenet_tree(root: Path, wnids: list[str]) -> None:
    for wnid in wnids:
        (root / "train" / wnid).mkdir(parents=True)
        (root / "val" / wnid).mkdir(parents=True)
    write(root / "train" / wnids[3] / f"{wnids[3]}_10026.JPEG")
    write(root / "train" / wnids[0] / f"{wnids[0]}_7.JPEG")
    write(root / "val" / wnids[3] / "ILSVRC2012_val_00000293.JPEG")


def test_imagenet(tmp_path: Path) -> None:
    wnids = [f"n{n:08d}" for n in range(1000)]
    imagenet_tree(tmp_path, wnids)
    source = open_source("imagenet", str(tmp_path), "train", False)
    assert source.classes == wnids
    assert listed(source) == {
        "n00000000/n00000000_7.JPEG": ("n00000000_n00000000_7", 0),
        "n00000003/n00000003_10026.JPEG": ("n00000003_n00000003_10026", 3),
    }
    source = open_source("imagenet", str(tmp_path), "val", False)
    assert [label for _, label in listed(source).values()] == [3]
    (tmp_path / "val" / wnids[999]).rmdir()
    with pytest.raises(UserError, match="999 class folders named by WordNet id, not 1000"):
        open_source("imagenet", str(tmp_path), "val", False)
    with pytest.raises(UserError, match="cannot be downloaded"):
        open_source("imagenet", str(tmp_path), "train", True)
    with pytest.raises(UserError, match="no split 'test': there are train, val"):
        open_source("imagenet", str(tmp_path), "test", False)


def test_imagenet_is_unpacked_from_its_archives(tmp_path: Path) -> None:
    """torchvision checks the devkit's checksum, so a fake archive can only test the refusal."""
    write(tmp_path / "ILSVRC2012_img_train.tar", b"no tar")
    with pytest.raises(UserError, match=r"no imagenet as .*devkit.*; get it at image-net\.org"):
        open_source("imagenet", str(tmp_path), "train", False)


def test_imagenet100(tmp_path: Path) -> None:
    wnids = existing(SHARED / "imagenet100_wnids.txt").read_text().split()
    imagenet_tree(tmp_path, [*sorted(wnids), "n99999999"])
    source = open_source("imagenet100", str(tmp_path), "train", False)
    assert source.classes == wnids
    assert len(set(wnids)) == 100
    for location, (_, label) in listed(source).items():
        assert location.startswith(wnids[label])
    for gone in (wnids[0], wnids[50]):
        for path in (tmp_path / "train" / gone).glob("*"):
            path.unlink()
        (tmp_path / "train" / gone).rmdir()
    with pytest.raises(UserError, match=rf"lacks 2 of the 100 .*{wnids[0]}, {wnids[50]}"):
        open_source("imagenet100", str(tmp_path), "train", False)


def test_imagenette(tmp_path: Path) -> None:
    for wnid in ("n01440764", "n03888257"):
        write(tmp_path / "imagenette2-160" / "train" / wnid / f"{wnid}_1.JPEG")
    source = open_source("imagenette", str(tmp_path), "train", False)
    assert source.classes == ["n01440764", "n03888257"]
    assert listed(source)["n03888257/n03888257_1.JPEG"] == ("n03888257_n03888257_1", 1)
    with pytest.raises(UserError, match="no such folder"):
        open_source("imagenette", str(tmp_path), "val", False)
    (tmp_path / "imagenette2").mkdir()
    with pytest.raises(UserError, match="holds imagenette2 and imagenette2-160; give one"):
        open_source("imagenette", str(tmp_path), "train", False)


def test_caltech101(tmp_path: Path) -> None:
    for name, count in {"BACKGROUND_Google": 2, "accordion": 33, "airplanes": 31}.items():
        for number in range(1, count + 1):
            write(tmp_path / "caltech101/101_ObjectCategories" / name / f"image_{number:04d}.jpg")
    parts = {
        split: listed(open_source("caltech101", str(tmp_path), split, False))
        for split in ("train", "test", "all")
    }
    labels = [label for _, label in parts["train"].values()]
    assert (labels.count(0), labels.count(1)) == (30, 30)
    assert len(parts["test"]) == 4
    assert parts["train"] | parts["test"] == parts["all"]
    assert parts["all"]["accordion/image_0033.jpg"] == ("accordion_image_0033", 0)


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flowers-102"
    for number in (1, 2, 3):
        write(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[77, 1, 102]])})
    savemat(folder / "setid.mat", {"trnid": [[3, 1]], "valid": [[2, 2]], "tstid": [[1, 2]]})
    with pytest.raises(UserError, match="not found or corrupted"):  # torchvision checks checksums
        open_source("flowers102", str(tmp_path), "train", False)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    source = open_source("flowers102", str(tmp_path), "train", False)
    assert source.classes[76] == "passion flower"
    assert listed(source) == {
        "image_00003.jpg": ("image_00003", 101),
        "image_00001.jpg": ("image_00001", 76),
    }


def test_stl10(tmp_path: Path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 96, 3), dtype=np.uint8)
    stored = images.transpose(0, 3, 2, 1)  # stored column by column
    for split in ("train", "unlabeled"):
        (folder / f"{split}_X.bin").write_bytes(stored.tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 10, 3]))
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("\n".join(names))
    source = open_source("stl10", str(tmp_path), "train", False)
    assert source.classes == names
    assert [label for _, label in listed(source).values()] == [0, 9, 2]
    source = pickle.loads(pickle.dumps(source))  # as for a worker, after it was read from
    png = source.read(SourceImage("", "1", 9))
    assert (np.asarray(Image.open(io.BytesIO(png))) == images[1]).all()
    assert len(pickle.dumps(source)) < 2000
    unlabeled = open_source("stl10", str(tmp_path), "unlabeled", False)
    assert {label for _, label in listed(unlabeled).values()} == {-1}
    assert not unlabeled.classes
    (folder / "train_y.bin").write_bytes(bytes([1, 10]))
    with pytest.raises(UserError, match="3 images but 2 labels"):
        open_source("stl10", str(tmp_path), "train", False)


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (5, 2, 32, 32, 3), dtype=np.uint8)
    for number, batch in enumerate(images):
        flat = batch.transpose(0, 3, 1, 2).reshape(2, -1)
        content = {"data": flat, "labels": [number, 9]}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(content))
    names = [f"name {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    source = open_source("cifar10", str(tmp_path), "train", False)
    assert source.classes == names
    assert [label for _, label in listed(source).values()] == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    png = source.read(SourceImage("", "7", 9))
    assert (np.asarray(Image.open(io.BytesIO(png))) == images[3, 1]).all()


def tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def webdataset_members() -> Iterator[tuple[str, bytes]]:
    yield "a/one.jpg", encode(noise(1))
    yield "a/one.cls", b"4\n"
    yield "a/one.caption.txt", b"ein Hund"
    yield "a/one.saliency.png", b"an older map"
    yield "two.json", b"{}"
    yield "two.png", encode(noise(2), "PNG")
    yield "three.txt", b"no image"
    yield "four.jpg", encode(noise(4))
    yield "four.cls", b"dog"


def test_webdataset(tmp_path: Path) -> None:
    tar(tmp_path / "train-000000.tar", list(webdataset_members()))
    tar(tmp_path / "train-000001.tar", [("a/one.JPEG", encode(noise(5))), ("a/one.cls", b"0")])
    source = open_source("webdataset", f"{tmp_path}/train-*.tar", "train", False)
    images, rejects = list_images(source.images())
    assert [(image.location, image.label) for image in images] == [
        ("train-000000.tar/a/one", 4),
        ("train-000000.tar/two", -1),
        ("train-000001.tar/a/one", 0),
    ]
    assert [(reject.source, reject.reason) for reject in rejects] == [
        ("train-000000.tar/three", "no-image"),
        ("train-000000.tar/four", "bad-label"),
    ]
    assert source.classes == ["0", "1", "2", "3", "4"]
    assert source.read(images[0]) == encode(noise(1))
    assert source.members(images[0]) == {"caption.txt": b"ein Hund"}
    assert source.members(images[1]) == {"json": b"{}"}
    again = open_source("webdataset", str(tmp_path), "train", False)
    assert list_images(again.images())[0] == images
    (tmp_path / "train-000002.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"train-000002\.tar: not a whole, uncompressed tar"):
        list_images(open_source("webdataset", str(tmp_path), "train", False).images())
    with pytest.raises(UserError, match="no tars"):
        open_source("webdataset", str(tmp_path / "absent"), "train", False)


def test_files_by_glob_and_by_list(tmp_path: Path) -> None:
    for name in ("x/a.jpg", "x/y/b.png", "c.jpg", "x/notes.txt"):
        write(tmp_path / name)
    found = listed(open_source("files", f"{tmp_path}/x/**/*.*g", "train", False))
    assert found == {"a.jpg": ("a", -1), "y/b.png": ("y_b", -1)}
    lines = ["x/a.jpg", "", str(tmp_path / "c.jpg"), f"file://{tmp_path}/x/y/b.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    found = listed(open_source("files", str(tmp_path / "list.txt"), "train", False))
    assert list(found) == [lines[0], *lines[2:]]
    for no_list in ("absent.txt", "x"):
        with pytest.raises(UserError, match=r"no such text file; .*DATASET=folder takes a folder"):
            open_source("files", str(tmp_path / no_list), "train", False)


def test_urls_in_a_list_are_read_by_the_readers_of_a_store(tmp_path: Path) -> None:
    for number, (line, readers) in enumerate(
        [("file:///a.jpg", LOCAL_READERS), ("memory://photos/a.jpg", REMOTE_READERS)]
    ):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"b.jpg\n{line}\n")
        source = open_source("files", str(path), "train", False)
        assert len(list_images(source.images())[0]) == 2
        assert count_readers(source) == readers


@pytest.mark.parametrize("line", [".", "./", "/", "//"])
def test_a_line_of_a_list_that_names_no_file_is_a_reject(line: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"a.jpg\n{line}\nb.jpg\n")
    source = open_source("files", str(tmp_path / "list.txt"), "train", False)
    images, rejects = list_images(source.images())
    assert [image.location for image in images] == ["a.jpg", "b.jpg"]
    assert [(reject.source, reject.reason) for reject in rejects] == [(line, "not-a-file")]


class OneImage(Source):
    """Custom source with a single image."""

    def __init__(self, root: str, split: str, download: bool):
        self.split = split

    def images(self) -> Iterator[SourceImage]:
        yield SourceImage("key", self.split, -1)

    def read(self, image: SourceImage) -> bytes:
        return encode(noise(0))


def test_a_source_of_ones_own() -> None:
    assert listed(open_source(f"{__name__}:OneImage", "", "val", False)) == {"val": ("key", -1)}
    with pytest.raises(UserError, match=f"{__name__} defines no Absent"):
        open_source(f"{__name__}:Absent", "", "val", False)
    with pytest.raises(UserError, match="did you mean imagenette"):
        open_source("imagenete", "", "val", False)
