"""End-to-end tests of the command: interruption, resuming, refusals and bad inputs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest
import ray
from ray import cloudpickle

from precompute.estimators import ScdaOptions
from precompute.resume import refuse_other_settings
from schemas import FormatError, ShardDataset, UserError
from schemas.shard import read_marker
from schemas.storage import Store
from tests.precompute.conftest import command, contents, run_here
from tests.ray_workers import ForkedJob
from tests.readers import READERS

pytestmark = pytest.mark.slow
# Ray's workers cannot import this file as a module
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def demo_arguments(out: Path) -> list[object]:
    return [
        *("--dataset", "demo", "--out", out, "--limit", 240, "--shard-samples", 6),
        *("--batch-size", 4, "--estimator", "spectral"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Path:
    out = tmp_path_factory.mktemp("job") / "uninterrupted"
    assert run_here(*demo_arguments(out), "--workers", 1) == 0  # runs that resume use all cores
    return out


def markers(out: Path) -> int:
    return len(list(out.glob("shards/*.parquet")))


def process(*arguments: object) -> int:
    """Return the id of the first process that pgrep finds."""
    found = subprocess.run(["pgrep", *map(str, arguments)], capture_output=True, check=True)
    return int(found.stdout.split()[0])


class Job(Protocol):
    """A job in a process of its own: `ForkedJob`, or the real command."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


def wait_until(condition: Callable[[], bool], job: Job) -> None:
    deadline = time.monotonic() + 240  # Ray starts a worker that does not answer anew after 60 s
    while not condition() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    said = job.log.read_text() if isinstance(job, ForkedJob) else "see the output of the test"
    assert job.poll() is None, f"the job ended before it could be killed: {said}"
    assert condition(), f"the job runs, but does not get there: {said}"


def assert_incomplete(out: Path, moment: int) -> None:
    """Assert that the job has left the shards, and nothing that is complete."""
    assert not (out / "dataset.json").exists()
    assert markers(out) >= moment


def test_interrupted_at_any_moment_it_ends_with_the_same_bytes(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the driver before the first shard, then a worker, then Ray; then send SIGTERM.

    The jobs have one worker each, except the last, which ends. The first uses the Ray of other
    tests, which continues without it. The one that gets SIGTERM is the real command, with workers
    that Ray starts as it does outside of tests.
    """
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default all other tests come first
    out = tmp_path / "out"
    options = [*demo_arguments(out), "--workers", 1]
    address = ray.get_runtime_context().gcs_address
    job = ForkedJob([*options, "--address", address], tmp_path / "first")
    wait_until((out / "shards").is_dir, job)
    job.kill()
    job.wait(60)
    assert_incomplete(out, 0)

    job = ForkedJob(options, tmp_path / "second")
    wait_until(lambda: markers(out) >= 4, job)
    os.kill(process("-s", job.pid, "-f", "ray::MapWorker"), signal.SIGKILL)
    wait_until(lambda: markers(out) >= 12, job)  # a worker that dies does not stop the job
    os.kill(process("-P", job.pid, "-x", "raylet"), signal.SIGKILL)
    status, errors = job.wait(60)
    assert status == 1
    assert "Ray's raylet died; run the same command again to resume" in errors
    assert_incomplete(out, 12)

    before = markers(out)
    with subprocess.Popen(
        command(*options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as real:
        wait_until(lambda: markers(out) >= before + 4, real)
        real.terminate()
        _, errors = real.communicate(timeout=60)
    assert real.returncode == 143
    assert re.search(r"terminated; \d+ of \d+ missing shards are written; run the same", errors)
    assert_incomplete(out, before + 4)

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
        (["--seed", 1], "seed was 0, is 1"),
        (["--estimator.sigma", 3], r"estimator\.sigma was 2\.5, is 3\.0"),
        (["--limit", 120], "images was 240, is 120"),
        (["--split", "val"], "split was train, is val"),
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
    with pytest.raises(UserError, match=r"settings: estimator\.name was spectral, is scda\."):
        refuse_other_settings(Store(uninterrupted), there, other, {}, lambda: "")
    with pytest.raises(UserError, match="other source images"):
        refuse_other_settings(
            Store(uninterrupted), there, there | {"plan": "other"}, {}, lambda: ""
        )


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
