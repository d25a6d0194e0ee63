"""Tests of failing jobs: bad inputs, dying workers, unwritable outputs and user errors."""

import os
import signal
import sys
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from precompute.estimators import SpectralOptions
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.progress_actor import ProgressActor
from precompute.reencode import Resize
from precompute.sources import SourceImage, list_images
from precompute.sources.base import digest_key
from precompute.sources.demo import DemoScenes
from precompute.worker import BuilderFactory, ShardActor
from schemas import ShardDataset, UserError
from tests.conftest import encode, noise
from tests.precompute.conftest import precompute, run_here

pytestmark = pytest.mark.slow
# Ray's workers cannot import this file as a module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("shared_ray")
def test_bad_inputs_are_rejected_and_all_else_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    good = encode(noise(0))
    inputs = {
        "ant/good.jpg": good,
        "ant/wrong-extension.png": encode(noise(1)),
        "ant/cut.jpg": good[:-40],
        "ant/empty.jpg": b"",
        "ant/notes.txt": b"no image",
        "bee/cat.jpg": encode(noise(2)),
        "bee/cat.png": encode(noise(3), "PNG"),
        "bee/moving.gif": encode(noise(4), "GIF"),
        "loose.jpg": good,
    }
    for name, content in inputs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "bee" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    arguments = ["--dataset", "folder", "--root", root, "--out", out, "--estimator", "spectral"]
    assert run_here(*arguments, "--workers", 1) == 0
    assert "rejects: 5" in capsys.readouterr().out
    dataset = ShardDataset.open(out)
    reasons = {row["source"]: row["reason"] for row in dataset.rejects.to_pylist()}
    assert reasons == {
        "ant/cut.jpg": "undecodable",
        "ant/empty.jpg": "empty",
        "ant/notes.txt": "not-an-image",
        "bee/dangling.jpg": "unreadable",
        "loose.jpg": "no-class",
    }
    assert dataset.verify().clean
    samples = {sample.source: sample for sample in dataset}
    assert samples.keys() | reasons.keys() == inputs.keys() | {"bee/dangling.jpg"}
    assert samples["ant/wrong-extension.png"].extension == "jpg"
    assert samples["bee/moving.gif"].reencoded
    assert samples["bee/cat.jpg"].key == "bee_cat"
    assert samples["bee/cat.png"].key == digest_key("bee_cat", "bee/cat.png")
    assert not samples["ant/good.jpg"].reencoded
    assert samples["ant/good.jpg"].image == good


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "folder", "--root", "absent"], "absent: no such folder"),
        (["--dataset", "folder", "--root", "empty"], "no images in it"),
        (["--dataset", "folder"], "--root is missing"),
        (["--dataset", "folder", "--root", ".."], "out: lies inside"),
        (["--dataset", "foldr"], "did you mean folder"),
        (["--dataset", "demo", "--estimator", "spectrl"], "did you mean spectral"),
        (
            ["--dataset", "demo", "--shard-samples", "0"],
            "--shard-samples is 0; it must be at least 1",
        ),
        (["--dataset", "demo", "--limit", "-3"], "--limit is -3; it must be at least 1"),
        (["--dataset", "demo", "--workers", "-1"], "--workers is -1; it must be at least 0"),
        (["--dataset", "demo", "--estimator.areas", "0"], "areas: must be above 0, at most 1"),
        (["--dataset", "demo", "--estimator.weights", "no.pt"], "no.pt: no such weights file"),
    ],
)
def test_a_users_mistake_is_named(
    arguments: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=message) as raised:
        run_here(*arguments, "--out", tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_users_mistake_is_one_line_without_traceback(tmp_path: Path) -> None:
    result = precompute("--dataset", "folder", "--root", tmp_path / "absent", "--out", tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        f"error: {tmp_path}/absent: no such folder; ROOT is a folder with one folder per class\n"
    )


@pytest.mark.usefixtures("shared_ray")
def test_nothing_readable_ends_with_an_error_and_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"none of the images could be read; see rejects\.parquet"):
        run_here(
            *("--dataset", "folder", "--root", tmp_path / "root", "--out", out),
            *("--estimator", "spectral"),
        )
    assert ShardDataset.open(out).rejects["reason"].to_pylist() == ["not-an-image"]


class PoisonSource(DemoScenes):
    """Source whose scene 3 kills the process that reads it."""

    def read(self, image: SourceImage) -> bytes:
        if image.location == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(image)


class FullDisk(DemoScenes):
    """Source that makes the output folder unwritable when the first image is read."""

    def __init__(self, out: Path):
        super().__init__("", "train", False)
        self.out = out

    def read(self, image: SourceImage) -> bytes:
        if (self.out / "shards").is_dir():
            (self.out / "shards").rmdir()
            (self.out / "shards").write_text("in the way")
        return super().read(image)


def job(source: DemoScenes, out: Path) -> Job:
    images = list_images(source.images())[0][:8]
    plan = make_plan(images, seed=0, shard_samples=4)
    return Job("demo", "train", source, plan, [], SpectralOptions(), 0, str(out), 4)


@pytest.mark.usefixtures("shared_ray")
def test_an_input_that_kills_its_worker_is_found_and_rejected(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_job(job(PoisonSource("", "train", False), out), Resources(workers=1))
    dataset = ShardDataset.open(out)
    assert dataset.rejects.to_pylist() == [
        {
            "source": "3",
            "reason": "kills-worker",
            "detail": "the process that read it died (SIGKILL)",
        }
    ]
    assert sorted(dataset.samples["source"].to_pylist()) == list("0124567")
    assert dataset.verify().clean


@pytest.mark.usefixtures("shared_ray")
def test_a_shard_that_fails_for_no_image_of_its_own_ends_the_job(tmp_path: Path) -> None:
    """Start from three recorded attempts, the last of which searched for crashing images."""
    progress = ray.remote(ProgressActor).remote()
    for _ in range(3):
        ray.get(progress.begin.remote(0))
    source = DemoScenes("", "train", False)
    factory = BuilderFactory(source, SpectralOptions(), str(tmp_path), 4, Resize(), {}, threads=1)
    error = ShardActor(factory, progress).build(0, list(source.images())[:4])
    assert error == "its worker crashed 3 times, but no single image crashes it"
    assert not list(tmp_path.iterdir())


class FailingStore(DemoScenes):
    """Source whose store does not answer, which is not the fault of any image."""

    def read(self, image: SourceImage) -> bytes:
        raise TimeoutError("no answer")


@pytest.mark.usefixtures("shared_ray")
def test_a_store_that_does_not_answer_ends_the_job_and_rejects_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shard \d failed: \d: the source fails: no answer"):
        run_job(job(FailingStore("", "train", False), tmp_path / "out"), Resources(workers=1))


def test_an_output_that_is_a_file_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="a file is in the way of a folder"):
        run_job(job(DemoScenes("", "train", False), tmp_path / "out"), Resources(workers=1))


@pytest.mark.usefixtures("shared_ray")
def test_an_output_that_cannot_be_written_ends_the_job(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="a file is in the way of a folder"):
        run_job(job(FullDisk(out), out), Resources(workers=1))


def test_a_shard_that_two_attempts_finish_ends_no_job() -> None:
    """A worker that was cut off from its cluster may finish after its successor has begun."""
    progress = ProgressActor()
    assert [progress.begin(0), progress.begin(0)] == [1, 2]
    progress.advance(0, 3, 0)
    progress.finish(0)
    progress.finish(0)
    assert (progress.totals(), progress.pending()) == ((3, 0, 1), {})
