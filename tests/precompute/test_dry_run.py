"""Tests of --dry-run: its time depends on the hardware that the estimator uses."""

from pathlib import Path
from tarfile import RECORDSIZE

import numpy as np
import pytest

from precompute import dry_run
from precompute import job as module
from precompute.__main__ import Options
from precompute.dry_run import (
    Machine,
    Measurement,
    compute_tar_size,
    estimate_job,
    estimate_speedup,
)
from precompute.estimators import ScdaOptions, SpectralOptions
from precompute.job import Job, Resources
from precompute.plan import make_plan
from precompute.sources import list_images
from precompute.sources.demo import DemoScenes
from schemas import Sample, UserError, write_dataset
from schemas.ustar import BLOCK


class OnGpu:
    """Fake estimator whose network is on a GPU."""

    side, weights_sha256, device, network_on_gpu = 1, None, "cuda", True

    def __call__(self, images: object) -> np.ndarray:
        raise AssertionError("measure_batches replaces all work")


@pytest.mark.parametrize(
    ("device", "cores", "devices", "times"),
    [("cuda", 16, 1, 1), ("cuda", 64, 4, 4), ("cpu", 16, 1, 3), ("cpu", 8, 0, 8)],
)
def test_the_rate_of_one_worker_is_multiplied_by_what_workers_do_not_share(
    device: str, cores: int, devices: int, times: int
) -> None:
    workers, _, _ = Resources().split(cores, devices, shards=1000)
    assert estimate_speedup(device, workers, Machine(cores, devices))[0] == times


def test_workers_without_a_core_do_not_count() -> None:
    assert estimate_speedup("cpu", 64, Machine(cores=2, devices=0))[0] == 2


def test_the_size_is_that_of_the_tar_with_all_members_of_a_sample(tmp_path: Path) -> None:
    samples = [
        Sample(str(n), b"x" * 700 * n, "jpg", np.eye(28), -1, 8, 8, members={"npy": bytes(9000)})
        for n in range(1, 20)
    ]
    dataset = write_dataset(tmp_path, samples, name="d")
    end = 2 * BLOCK
    assert 0 <= dataset.shards[0].bytes - sum(map(compute_tar_size, samples)) - end < RECORDSIZE


def test_a_dry_run_does_not_speak_for_a_cluster() -> None:
    with pytest.raises(UserError, match="not on the cluster at auto; leave --address out"):
        Options(dataset="demo", out="out", dry_run=True, address="auto")


def test_sixteen_cores_do_not_make_one_gpu_sixteen_times_as_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DemoScenes("", "train", False)
    plan = make_plan(list_images(source.images())[0][:100], seed=0, shard_samples=10)
    job = Job("d", "train", source, plan, [], ScdaOptions(), 0, str(tmp_path / "out"), 4)
    monkeypatch.setattr(ScdaOptions, "build", lambda self, device="auto": OnGpu())
    monkeypatch.setattr(
        dry_run, "measure_batches", lambda *given: Measurement(1000, 10, 0, seconds=10.0, timed=10)
    )
    text = estimate_job(job, Resources(), Machine(cores=16, devices=1))
    assert "about 01:40 with 3 workers on 1 of 1 GPU: 1.0 images/s per worker with" in text
    assert not (tmp_path / "out").exists()


def test_the_driver_builds_its_estimator_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the GPU, the driver's context would stay for the whole job and may exclude the workers."""
    devices = []
    build = SpectralOptions.build

    def remember(self: SpectralOptions, device: str = "auto") -> object:
        devices.append(device)
        return build(self, device)

    def stop(*given: object) -> float:
        raise UserError("the workers would start here")

    monkeypatch.setattr(SpectralOptions, "build", remember)
    monkeypatch.setattr(module, "build_shards", stop)
    source = DemoScenes("", "train", False)
    plan = make_plan(list_images(source.images())[0][:4], seed=0, shard_samples=4)
    job = Job("d", "train", source, plan, [], SpectralOptions(), 0, str(tmp_path / "out"), 4)
    with pytest.raises(UserError, match="the workers would start here"):
        module.run_job(job, Resources())
    assert devices == ["cpu"]
