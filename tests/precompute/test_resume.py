"""Tests of jobs in a folder that another job has written to: refusals and their advice."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from precompute import output_lock
from precompute.__main__ import report
from precompute.estimators import ScdaOptions, SpectralOptions
from precompute.extend import select_new
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.resume import find_missing_shards
from precompute.sources import list_images
from precompute.sources.demo import DemoScenes
from schemas import Sample, ShardDataset, UserError
from schemas.shard import write_shard
from schemas.storage import Store
from schemas.tables import CARD, SAMPLES

Make = Callable[..., Sample]
SOURCE = DemoScenes("", "train", False)
IMAGES = list_images(SOURCE.images())[0]


def job_of(out: object, images: int = 6, shard_samples: int = 3) -> Job:
    plan = make_plan(IMAGES[:images], seed=0, shard_samples=shard_samples)
    return Job("d", "train", SOURCE, plan, [], SpectralOptions(), 0, str(out), 4)


def extension_of(job: Job, dataset: ShardDataset, images: int = 3) -> Job:
    plan = make_plan(IMAGES[-images:], seed=0, shard_samples=3)
    return replace(job, plan=plan, before=dataset.card)


def write(job: Job, shard: int, make_sample: Make) -> None:
    """Write a shard of one sample as the job would, with its settings."""
    write_shard(Store(job.out), shard, [make_sample(shard)], settings=job.settings(None))


def finish(job: Job) -> ShardDataset:
    return job.finish(Store(job.out), job.settings(None), saliency_side=28)


def missing(job: Job) -> list[int]:
    return find_missing_shards(Store(job.out), job.settings(None), job.default_settings)


@pytest.mark.parametrize("place", ["memory://two_jobs", "local"])
def test_shards_of_two_jobs_are_not_merged(place: str, tmp_path: Path, make_sample: Make) -> None:
    job = job_of(place if "://" in place else tmp_path)
    write(replace(job, seed=1, estimator=ScdaOptions(backbone="resnet18")), 0, make_sample)
    write(job, 1, make_sample)
    with pytest.raises(
        UserError, match=r"shard 0 was .*name was scda, is spectral; seed was 1.*shards/000000\.\*"
    ):
        finish(job)
    assert not Store(job.out).exists("dataset.json")
    write(job_of(job.out, images=7), 0, make_sample)
    with pytest.raises(UserError, match="shard 0 was written by another job: images was 7, is 6"):
        finish(job)
    others = make_plan(IMAGES[1:7], seed=0, shard_samples=3)
    write(replace(job, plan=others), 0, make_sample)
    with pytest.raises(UserError, match="shard 0 was written by another job: of other source imag"):
        finish(job)
    write(job, 0, make_sample)
    assert len(finish(job)) == 2


def test_an_extension_is_merged_with_its_dataset_only(tmp_path: Path, make_sample: Make) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    more = extension_of(job, finish(job))
    write(more, 2, make_sample)
    assert len(finish(more)) == 3
    write(replace(job, seed=1), 1, make_sample)
    with pytest.raises(UserError, match=r"shard 1 was .*seed was 1, is 0.*new dataset in another"):
        finish(more)


def test_a_complete_dataset_has_its_statistics(
    tmp_path: Path, make_sample: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stats, card = job_of(tmp_path), tmp_path / "stats.json", tmp_path / CARD
    for shard in range(2):
        write(job, shard, make_sample)
    write_file = Store.write

    def die_before_card(store: Store, name: str, content: bytes) -> None:
        if name == CARD:
            raise KeyboardInterrupt
        write_file(store, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", die_before_card)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, Resources())
    assert stats.exists()
    assert not card.exists()
    run_job(job, Resources())
    content, written = json.loads(stats.read_text()), card.stat().st_mtime_ns
    assert content["dataset"]["samples"] == json.loads(card.read_text())["samples"] == 2
    assert report(run_job(job, Resources())).startswith(f"nothing to do: {tmp_path} is complete")
    stats.unlink()  # as a job of an earlier version left it that was killed behind the card
    assert report(run_job(job, Resources())).startswith("only tables were missing and are written")
    assert json.loads(stats.read_text())["dataset"] == content["dataset"]
    assert card.stat().st_mtime_ns == written
    (tmp_path / SAMPLES).unlink()
    assert report(run_job(job, Resources())).startswith("only tables were missing and are written")
    assert (tmp_path / SAMPLES).exists()


def test_a_second_job_does_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_lock, "LOCK_SECONDS", 0.1)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(UserError, match="another precompute job is writing here"),
    ):
        run_job(job_of(tmp_path), Resources())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_remains_of_a_larger_job_are_refused(tmp_path: Path, make_sample: Make) -> None:
    """A job that was killed between a tar and its marker leaves settings of no shard."""
    for shard in (2, 3):
        write(job_of(tmp_path, images=12), shard, make_sample)
        (tmp_path / "shards" / f"00000{shard}.parquet").unlink()
    with pytest.raises(UserError, match=r"a larger dataset \(shards/000003\.tar\); choose another"):
        missing(job_of(tmp_path))


def test_extend_is_offered_only_for_a_whole_dataset(tmp_path: Path, make_sample: Make) -> None:
    job = job_of(tmp_path)
    write(job, 0, make_sample)
    with pytest.raises(
        UserError, match=r"images was 6, is 9.*restore the source as it "
    ) as refusal:
        missing(job_of(tmp_path, images=9))
    assert "--extend" not in str(refusal.value)
    assert missing(job) == [1]
    write(job, 1, make_sample)
    finish(job)
    with pytest.raises(UserError, match=r"images was 6, is 9.*add new images by --extend"):
        missing(job_of(tmp_path, images=9))
    Path(tmp_path, "shards", "000001.parquet").unlink()  # `--extend` needs it
    with pytest.raises(
        UserError, match=r"images was 6, is 9.*restore the source as it "
    ) as refusal:
        missing(job_of(tmp_path, images=9))
    assert "--extend" not in str(refusal.value)


def test_other_shards_of_the_same_images_are_told_by_their_option(
    tmp_path: Path, make_sample: Make
) -> None:
    write(job_of(tmp_path), 0, make_sample)
    with pytest.raises(UserError, match=r"settings: shards \(from --shard-samples\) was 2, is 3"):
        missing(job_of(tmp_path, shard_samples=2))
    with pytest.raises(UserError, match=r"images was 6, is 9; shards was 2, is 3"):
        missing(job_of(tmp_path, images=9))


def test_an_interrupted_extension_of_another_source_is_finished_or_deleted(
    tmp_path: Path, make_sample: Make
) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    dataset = finish(job)
    earlier, larger = extension_of(job, dataset, images=4), extension_of(job, dataset, images=5)
    write(earlier, 2, make_sample)
    assert missing(earlier) == [3]
    with pytest.raises(
        UserError, match=r"images was 4, is 5.*delete its shards \(shards/000002\.\*"
    ) as refusal:
        missing(larger)
    assert "--extend" not in str(refusal.value)
    for path in tmp_path.glob("shards/000002.*"):
        path.unlink()
    assert missing(larger) == [2, 3]
    with pytest.raises(UserError, match=r"seed was 0, is 1\. Give the earlier values, or choose"):
        missing(replace(larger, seed=1))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_missing_marker_is_named_with_the_command_that_rebuilds_it(
    lost: int, tmp_path: Path, make_sample: Make
) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    dataset = finish(job)
    marker = tmp_path / "shards" / f"00000{lost}.parquet"
    marker.unlink()
    with pytest.raises(UserError, match=f"{marker}: missing; to rebuild it, run .* without --ext"):
        select_new(str(tmp_path), IMAGES[:9], [], list(SOURCE.classes))
    if lost == 0:
        with pytest.raises(UserError, match=f"{marker}: missing; to rebuild it, run"):
            missing(extension_of(job, dataset))
    assert missing(job) == [lost]
    write(job, lost, make_sample)
    more = extension_of(job, finish(job))
    write(more, 2, make_sample)
    finish(more)
    marker.unlink()
    with pytest.raises(UserError, match=f"{marker}: missing; restore it from a copy"):
        select_new(str(tmp_path), IMAGES[:9], [], list(SOURCE.classes))
    for path in tmp_path.glob("shards/*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match=r"000000\.parquet: missing \(and 2 others\); to rebuild"):
        select_new(str(tmp_path), IMAGES[:9], [], list(SOURCE.classes))


@pytest.mark.parametrize("name", ["samples.parquet", "shards.parquet", "rejects.parquet"])
def test_the_same_command_writes_a_lost_table_again(
    name: str, tmp_path: Path, make_sample: Make
) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    finish(job)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    summary = run_job(job, Resources())
    assert (tmp_path / name).read_bytes() == content
    assert (summary.shards, len(summary.dataset)) == (0, 2)


def test_the_remains_of_a_job_that_was_killed_while_it_merged_are_removed(
    tmp_path: Path, make_sample: Make
) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    for name in ("samples.parquet.0123abcd.tmp", "shards/000000.tar.0123abcd.tmp", "my.tmp"):
        (tmp_path / name).write_bytes(b"half of it")
    finish(job)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == ["my.tmp"]
