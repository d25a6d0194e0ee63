"""Tests of --resize, --extend, --dry-run, stats.json, and images that need much memory."""

import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from precompute import decode, progress
from precompute.progress import describe_stall
from precompute.progress_actor import ProgressActor
from precompute.reencode import EncodedImage, RejectedError, Resize, check
from precompute.sources import SourceImage
from precompute.sources.base import digest_key
from schemas import ShardDataset, UserError
from schemas.shard import read_marker
from tests.conftest import encode, noise
from tests.precompute.conftest import contents, run_here

IMAGE = SourceImage("key", "a/b.jpg", 0)


def checked(content: bytes, resize: Resize) -> EncodedImage:
    return check(IMAGE, content, {}, resize)


def opened(encoded: EncodedImage) -> Image.Image:
    return Image.open(io.BytesIO(encoded.content))


def test_resize_shrinks_the_shorter_side_and_keeps_smaller_images() -> None:
    pixels = noise(0, 300, 451)
    shrunk = checked(encode(pixels, "PNG"), Resize(128, quality=95))
    assert opened(shrunk).size == (192, 128)
    assert (shrunk.extension, shrunk.reencoded) == ("jpg", True)
    expected = Image.fromarray(pixels).resize((192, 128), Image.Resampling.BICUBIC)
    assert abs(np.asarray(opened(shrunk), int) - np.asarray(expected, int)).mean() < 2
    for size in ((128, 400), (60, 500)):
        small = encode(noise(0, *size))
        assert checked(small, Resize(128)).content == small
    worse = checked(encode(pixels, "PNG"), Resize(128, quality=20))
    assert len(worse.content) < len(shrunk.content)


def test_a_quality_without_a_size_is_refused() -> None:
    with pytest.raises(UserError, match="--resize-quality: give --resize too"):
        Resize(quality=80)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_resize_applies_the_orientation(orientation: int) -> None:
    """The JPEG is decoded at a fraction of its size, so height and width must not be swapped."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(3, 400, 1200)
    shrunk = opened(checked(encode(pixels, exif=exif), Resize(50)))
    assert shrunk.size == ((150, 50) if orientation < 5 else (50, 150))
    assert not shrunk.getexif().get(0x0112)
    plain = opened(checked(encode(pixels), Resize(50)))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transpositions by EXIF
    expected = plain.transpose(turn[orientation]) if orientation > 1 else plain
    assert abs(np.asarray(shrunk, int) - np.asarray(expected, int)).mean() < 3


@pytest.mark.parametrize("image_format", ["TIFF", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_resize_keeps_the_proportions_of_every_format(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((600, 800, 3), np.uint8)
    pixels[260:340, 360:440] = 255  # a square in the middle
    shrunk = opened(checked(encode(pixels, image_format, exif=exif), Resize(240)))
    assert shrunk.size == ((320, 240) if orientation < 5 else (240, 320))
    left, top, right, bottom = shrunk.convert("L").point(lambda value: value > 127).getbbox()
    assert abs((right - left) - 32) <= 1
    assert abs((bottom - top) - 32) <= 1


def test_resize_of_what_cannot_be_read_is_a_reject() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(RejectedError):
        checked(encode(noisy)[:2000], Resize(32))


def test_large_images_are_decoded_in_smaller_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PIXELS_AT_ONCE", 1000)
    sizes = [400, 400, 400, 3000, 10, 990, 1]
    images = [EncodedImage(IMAGE, b"", "jpg", False, size, {}) for size in sizes]
    groups = [[image.pixels for image in group] for group in decode.split_by_pixels(images)]
    assert groups == [[400, 400], [400], [3000], [10, 990], [1]]


def test_what_is_pending_is_named() -> None:
    assert "does the cluster have free cores?" in describe_stall({})
    text = describe_stall({shard: 400.0 for shard in range(10)})
    assert "shards 0 (for 400 s), 1 (for 400 s)" in text
    assert text.endswith("and 2 more")


def folder(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(noise(len(name) + sum(name.encode()))))


def arguments(root: Path, out: Path) -> list[object]:
    return [
        *("--dataset", "folder", "--root", root, "--out", out, "--shard-samples", 3),
        *("--estimator", "spectral", "--workers", 1),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_new_images_are_added_in_new_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    folder(root, *[f"ant/{n}.jpg" for n in range(4)], "bee/0.jpg")
    (root / "ant" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="no complete dataset to extend"):
        run_here(*arguments(root, out), "--extend")
    run_here(*arguments(root, out))
    before = contents(out)
    capsys.readouterr()
    assert run_here(*arguments(root, out), "--extend") == 0
    assert "contains every image" in capsys.readouterr().out
    assert contents(out) == before

    folder(root, *[f"bee/{n}.jpg" for n in range(1, 5)], "cat/0.jpg", "ant/0.png")
    with pytest.raises(UserError, match=r"images was 6, is 12.*--extend"):
        run_here(*arguments(root, out))
    run_here(*arguments(root, out), "--extend")
    dataset = ShardDataset.open(out)
    assert dataset.verify().clean
    assert dataset.classes == ["ant", "bee", "cat"]
    assert (len(dataset), len(dataset.shards)) == (11, 4)
    added = dataset.samples.slice(5)["source"].to_pylist()
    assert sorted(added) == ["ant/0.png", *(f"bee/{n}.jpg" for n in range(1, 5)), "cat/0.jpg"]
    keys = dict(zip(*(dataset.samples[c].to_pylist() for c in ("source", "key")), strict=True))
    assert keys["ant/0.jpg"] == "ant_0"  # unchanged
    assert keys["ant/0.png"] == digest_key("ant_0", "ant/0.png")
    assert {row["source"]: row["reason"] for row in dataset.rejects.to_pylist()} == {
        "ant/notes.txt": "not-an-image"
    }
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.startswith("shards/"))

    # resume after an interruption just before the card was written, with one shard damaged
    (out / "dataset.json").write_bytes(before["dataset.json"])
    (out / "shards" / "000003.parquet").unlink()
    with pytest.raises(UserError, match=r"not finished: its dataset\.json counts 5 samples in 2"):
        ShardDataset.open(out)
    run_here(*arguments(root, out), "--extend")
    assert contents(out) == after

    folder(root, "aaa/0.jpg")
    with pytest.raises(UserError, match="its labels would change"):
        run_here(*arguments(root, out), "--extend")
    shutil.rmtree(root / "aaa")
    folder(root, "cat/1.jpg")
    with pytest.raises(UserError, match=r"estimator\.sigma was 2\.5, is 4\.0"):
        run_here(*arguments(root, out), "--extend", "--estimator.sigma", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_resized_datasets_and_what_a_run_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    folder(root, *[f"ant/{n}.jpg" for n in range(5)])  # 40 x 56 pixels each
    (root / "ant" / "empty.jpg").touch()
    run_here(*arguments(root, out), "--dry-run", "--resize", 20)
    text = capsys.readouterr().out
    assert not out.exists()
    assert f"6 images -> 2 shards in {out}" in text
    assert "missing: 2 shards, 6 images" in text
    assert "images/s per worker with" in text
    assert "(measured on 6 images), speedup 1x" in text

    run_here(*arguments(root, out), "--resize", 20, "--resize-quality", 80)
    dataset = ShardDataset.open(out)
    assert dataset.verify().clean
    assert {(row["height"], row["width"]) for row in dataset.samples.to_pylist()} == {(20, 28)}
    assert all(dataset.samples["reencoded"].to_pylist())
    assert read_marker(dataset.store, 0).settings["resize"] == 20
    stats = json.loads((out / "stats.json").read_text())
    assert stats["run"]["images"] == 6
    assert stats["dataset"]["rejects"] == {"empty": 1}
    share = np.mean(dataset.samples["foreground"].to_pylist())
    assert stats["dataset"]["foreground"] == pytest.approx(share, abs=1e-4)
    assert f"foreground: {share:.0%} of the cells" in capsys.readouterr().out
    with pytest.raises(UserError, match="resize was 20, is None"):
        run_here(*arguments(root, out))
    with pytest.raises(UserError, match=r"--resize-quality is 99; it must be in 1 \.\. 95"):
        run_here(*arguments(root, out), "--resize", 20, "--resize-quality", 99)


class HangingActor(ProgressActor):
    """Never answers in the time that the tests give it."""

    def totals(self) -> tuple[int, int, int]:
        time.sleep(30)
        return super().totals()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_an_actor_that_hangs_holds_up_neither_the_message_nor_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(progress, "ANSWER_SECONDS", 0.1)
    actor = ray.remote(HangingActor).remote()
    ray.get(actor.begin.remote(0))
    with progress.watch(actor, images=10, shards=1):
        time.sleep(2)
    err = capsys.readouterr().err
    assert "no progress: Ray's process that counts it does not answer" in err
    with pytest.raises(ray.exceptions.GetTimeoutError):  # it still hangs
        ray.get(actor.pending.remote(), timeout=0.1)
    ray.kill(actor)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_job_that_stands_still_says_which_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.05)
    actor = ray.remote(ProgressActor).remote()
    ray.get([actor.begin.remote(3), actor.begin.remote(5), actor.finish.remote(5)])
    with progress.watch(actor, images=10, shards=2):
        time.sleep(1)
    captured = capsys.readouterr()
    assert "started but not finished: shards 3 (for" in captured.err
    assert " 5 (for" not in captured.err
    assert "0/10 images" in captured.out
    assert "1/2 shards" in captured.out
