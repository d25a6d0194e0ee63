"""The job from end to end, as a user runs it: interrupted, repeated, refused, with bad inputs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle

from precompute.demo import DemoScenes
from precompute.encode import Resize
from precompute.estimators import ScdaOptions, SpectralOptions
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.resume import refuse_other_settings
from precompute.sources import SourceImage, list_images
from precompute.worker import BuilderFactory, Ledger, ShardActor
from schemas import FormatError, ShardDataset, UserError
from schemas.shard import read_marker
from schemas.storage import Store
from tests.conftest import encode, noise
from tests.precompute.conftest import contents, run_here
from tests.readers import READERS

pytestmark = pytest.mark.slow
# this file is not a module that Ray's workers could import
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "precompute", *map(str, arguments)]


def precompute(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=300
    )


def demo_arguments(out: Path) -> list[object]:
    return [
        *("--dataset", "demo", "--out", out, "--limit", 240, "--shard-samples", 6),
        *("--batch-size", 4, "--estimator", "spectral"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Path:
    out = tmp_path_factory.mktemp("job") / "uninterrupted"
    assert run_here(*demo_arguments(out)) == 0
    return out


def markers(out: Path) -> int:
    return len(list(out.glob("shards/*.parquet")))


def process(*arguments: object) -> int:
    """The first process that pgrep finds."""
    found = subprocess.run(["pgrep", *map(str, arguments)], capture_output=True, check=True)
    return int(found.stdout.split()[0])


def wait_for(out: Path, moment: int, job: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while markers(out) < moment and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert job.poll() is None, "the job ended before it could be killed"


def test_interrupted_at_any_moment_it_ends_with_the_same_bytes(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """SIGKILL of the driver before the first shard, of Ray, of a worker, and SIGTERM."""
    out = tmp_path / "out"
    for moment, victim in ((0, "driver"), (4, "raylet"), (8, "worker")):
        job = subprocess.Popen(
            command(*demo_arguments(out)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for(out, moment, job)
        if victim == "driver":
            time.sleep(2)
            job.kill()
        elif victim == "raylet":
            os.kill(process("-P", job.pid, "-x", "raylet"), signal.SIGKILL)
        else:
            os.kill(process("-s", job.pid, "-f", "ray::MapWorker"), signal.SIGKILL)
            wait_for(out, 16, job)  # a worker that dies does not stop the job
            job.terminate()
        _, errors = job.communicate(timeout=20)
        assert not (out / "dataset.json").exists()
        assert markers(out) >= moment
        if victim == "raylet":
            assert job.returncode == 1
            assert "Ray's raylet died; the same command goes on from here" in errors
        if victim == "worker":
            assert job.returncode == 143
            assert re.search(r"terminated; \d+ of \d+ missing shards are written, the same", errors)
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")}
    assert run_here(*demo_arguments(out)) == 0
    assert contents(out) == contents(uninterrupted)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shards/*.parquet")}
    assert len(written) >= 16
    assert written.items() <= kept.items(), "a shard that was there was written again"


def test_nothing_is_left_to_do_the_second_time(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(uninterrupted)
    assert run_here(*demo_arguments(uninterrupted)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(uninterrupted) == before


@pytest.mark.usefixtures("shared_ray")
def test_what_is_damaged_is_made_again(uninterrupted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    tar = out / "shards" / "000003.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    (out / "shards" / "000005.idx").unlink()
    (out / "shards" / "000007.parquet").write_bytes(b"damaged")
    (out / "shards" / "000009.tar.0badcafe.tmp").write_bytes(b"half")
    assert run_here(*demo_arguments(out)) == 0
    assert contents(out) == contents(uninterrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", 1], "seed is 0 there and 1 now"),
        (["--estimator.sigma", 3], "estimator.sigma is 2.5 there and 3.0 now"),
        (["--limit", 120], "images is 240 there and 120 now"),
        (["--split", "val"], "split is train there and val now"),
    ],
)
def test_other_settings_are_refused(uninterrupted: Path, change: list, message: str) -> None:
    before = contents(uninterrupted)
    with pytest.raises(UserError, match=message):
        run_here(*demo_arguments(uninterrupted), *change)
    assert contents(uninterrupted) == before


def test_a_newer_format_is_left_alone(uninterrupted: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    card = json.loads((out / "dataset.json").read_text()) | {"format_version": 2}
    (out / "dataset.json").write_text(json.dumps(card))
    (out / "shards" / "000000.parquet").write_bytes(b"of a form that is not known yet")
    before = contents(out)
    with pytest.raises(FormatError, match=r"format version 2.*upgrade to read it"):
        run_here(*demo_arguments(out))
    assert contents(out) == before


def test_other_source_images_are_refused(uninterrupted: Path) -> None:
    there = read_marker(Store(uninterrupted), 0).settings
    other = there | {"estimator": {"name": "scda", "backbone": "resnet50"}}
    with pytest.raises(UserError, match=r"settings: estimator is spectral there and scda now\."):
        refuse_other_settings(Store(uninterrupted), there, other)
    with pytest.raises(UserError, match="other source images"):
        refuse_other_settings(Store(uninterrupted), there, there | {"plan": "other"})


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
    assert "rejects: 6" in capsys.readouterr().out
    dataset = ShardDataset.open(out)
    reasons = {row["source"]: row["reason"] for row in dataset.rejects.to_pylist()}
    assert reasons == {
        "ant/cut.jpg": "undecodable",
        "ant/empty.jpg": "empty",
        "ant/notes.txt": "not-an-image",
        "bee/cat.png": "key-collision",
        "bee/dangling.jpg": "unreadable",
        "loose.jpg": "no-class",
    }
    assert dataset.verify().clean
    samples = {sample.source: sample for sample in dataset}
    assert samples.keys() | reasons.keys() == inputs.keys() | {"bee/dangling.jpg"}
    assert samples["ant/wrong-extension.png"].extension == "jpg"
    assert samples["bee/moving.gif"].reencoded
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
        (["--dataset", "demo", "--shard-samples", "0"], "--shard-samples is 0; at least 1"),
        (["--dataset", "demo", "--limit", "-3"], "--limit is -3; at least 1"),
        (["--dataset", "demo", "--workers", "-1"], "--workers is -1; at least 0"),
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
        f"error: {tmp_path}/absent: no such folder; ROOT is a folder with one folder a class\n"
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
    """Its scene 3 kills whatever process reads it."""

    def read(self, image: SourceImage) -> bytes:
        if image.location == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(image)


class FullDisk(DemoScenes):
    """Stands for a folder in which no file can be made any more, from the first shard on."""

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
    """Three attempts are on the ledger already: two by chance, the third behind the search."""
    ledger = ray.remote(Ledger).remote()
    for _ in range(3):
        ray.get(ledger.begin.remote(0))
    source = DemoScenes("", "train", False)
    factory = BuilderFactory(source, SpectralOptions(), str(tmp_path), 4, Resize(), {}, threads=1)
    error = ShardActor(factory, ledger).build(0, list(source.images())[:4])
    assert error == "its worker died 3 times, and no image of it kills one alone"
    assert not list(tmp_path.iterdir())


class FailingStore(DemoScenes):
    """A store that no longer answers: no fault of the image that is asked for."""

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


@pytest.fixture(scope="module")
def photo_shards(
    photos: Path,
    mobilenet_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shared_ray: None,
) -> ShardDataset:
    out = tmp_path_factory.mktemp("photos") / "out"
    arguments = [
        *("--dataset", "folder", "--root", photos, "--out", out, "--limit", 8),
        *("--shard-samples", 4, "--estimator.backbone", "mobilenet_v2", "--workers", 1),
        *("--estimator.weights", mobilenet_weights),
    ]
    assert run_here(*arguments) == 0
    assert run_here(*arguments) == 0, "the same settings were taken for others"
    return ShardDataset.open(out)


def test_scda_runs_in_workers_on_photos(photo_shards: ShardDataset) -> None:
    assert photo_shards.verify().clean
    card = photo_shards.card
    assert (card.samples, card.shards, card.rejects) == (8, 2, 0)
    assert card.estimator["name"] == ScdaOptions.name
    assert card.estimator["backbone"] == "mobilenet_v2"
    assert len(card.estimator["weights_sha256"]) == 64


@pytest.mark.parametrize("reader", READERS)
def test_others_read_the_shards_of_photos(photo_shards: ShardDataset, reader: str) -> None:
    rows = photo_shards.samples.to_pylist()
    seen = list(READERS[reader](photo_shards))
    assert [label for label, _, _ in seen] == [row["label"] for row in rows]
    for (_, image, saliency), row in zip(seen, rows, strict=True):
        assert sorted(image) == sorted((row["height"], row["width"]))  # stored, not yet oriented
        assert saliency == (28, 28)
