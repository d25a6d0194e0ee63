"""Tests of jobs in a folder that another job has written to: refusals and their advice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from precompute import output_lock
from precompute.demo import DemoScenes
from precompute.estimators import ScdaOptions, SpectralOptions
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.sources import list_images
from schemas import Sample, ShardDataset, UserError
from schemas.shard import write_shard
from schemas.storage import Store

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


@pytest.mark.parametrize("place", ["memory://two_jobs", "local"])
def test_shards_of_two_jobs_are_not_merged(place: str, tmp_path: Path, make_sample: Make) -> None:
    job = job_of(place if "://" in place else tmp_path)
    write(replace(job, seed=1, estimator=ScdaOptions(backbone="resnet18")), 1, make_sample)
    write(job, 0, make_sample)
    with pytest.raises(
        UserError, match=r"shard 1 was .*name was scda, is spectral; seed was 1.*shards/000001\.\*"
    ):
        finish(job)
    assert not Store(job.out).exists("dataset.json")
    write(job_of(job.out, images=7), 1, make_sample)
    with pytest.raises(UserError, match="shard 1 was written by another job: images was 7, is 6"):
        finish(job)
    write(job, 1, make_sample)
    assert len(finish(job)) == 2


def test_an_extension_is_merged_with_its_dataset_only(tmp_path: Path, make_sample: Make) -> None:
    job = job_of(tmp_path)
    for shard in range(2):
        write(job, shard, make_sample)
    more = extension_of(job, finish(job))
    write(more, 2, make_sample)
    assert len(finish(more)) == 3
    write(replace(job, seed=1), 1, make_sample)
    with pytest.raises(UserError, match=r"shard 1 was .*seed was 1, is 0.*anew in another OUT"):
        finish(more)


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
