"""Two nodes, one of which dies: the job ends with the bytes that one machine writes."""

import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from precompute.demo import DemoScenes
from precompute.estimators import SpectralOptions
from precompute.job import Job, Resources, run_job
from precompute.plan import make_plan
from precompute.sources import SourceImage
from schemas import ShardDataset, UserError
from tests.precompute.conftest import without_ray

pytestmark = pytest.mark.slow


def job(out: Path) -> Job:
    source = DemoScenes("", "train", False)
    images = [image for image in source.images() if isinstance(image, SourceImage)][:120]
    plan = make_plan(images, seed=0, shard_samples=4)
    return Job("demo", "train", source, plan, [], SpectralOptions(), 0, str(out), 4)


def test_a_node_that_dies_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # this cluster's processes have no token, whatever lies in the home
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # five seconds: a node that only has to wait for its core is not taken for dead
    quickly = {"health_check_period_ms": 500, "health_check_failure_threshold": 10}
    head = {"num_cpus": 1, "_system_config": quickly}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    one, two = tmp_path / "one", tmp_path / "two"
    killed_at: list[int] = []

    def kill() -> None:
        while len(list(two.glob("shards/*.parquet"))) < 6:
            time.sleep(0.01)
        cluster.remove_node(second, allow_graceful=False)
        killed_at.append(len(list(two.glob("shards/*.parquet"))))

    killer = threading.Thread(target=kill, daemon=True)
    try:
        killer.start()
        run_job(job(two), Resources(cluster.address, workers=2))
        killer.join(10)
        assert killed_at, "the node was not killed"
        assert killed_at[0] < 30, "the node was killed too late"
    finally:
        ray.shutdown()
        cluster.shutdown()
    dataset = ShardDataset.open(two)
    assert dataset.verify().clean
    assert dataset.digest == without_ray(job(one)).digest
    for path in one.glob("shards/*"):
        assert path.read_bytes() == (two / "shards" / path.name).read_bytes()


def test_a_cluster_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_job(job(tmp_path), Resources("127.0.0.1:1"))


def test_a_worker_cannot_have_more_than_there_is() -> None:
    assert Resources().split(cores=8, devices=0, shards=100) == (8, 1, 0)
    assert Resources(cpus=4).split(cores=8, devices=0, shards=100) == (2, 4, 0)
    assert Resources(gpus=0.5).split(cores=16, devices=4, shards=100) == (8, 2, 0.5)
    assert Resources(workers=4).split(cores=2, devices=0, shards=3) == (3, 2 / 3, 0)
    assert Resources(workers=8, gpus=1).split(cores=16, devices=4, shards=100) == (8, 2, 0.5)
    with pytest.raises(UserError, match="0 CPUs and 2 GPUs, the cluster has 8 and 1"):
        Resources(gpus=2).split(cores=8, devices=1, shards=3)


@pytest.mark.parametrize(
    ("cores", "devices", "shards", "expected"),
    [
        (16, 1, 100, (3, 16 / 3, 0.3333)),  # three a GPU, where each has two cores or more
        (4, 1, 100, (2, 2, 0.5)),
        (2, 1, 100, (1, 2, 1)),
        (1, 1, 100, (1, 1, 1)),
        (64, 8, 1000, (24, 64 / 24, 0.3333)),
        (32, 8, 1000, (16, 2, 0.5)),
        (16, 4, 4, (4, 4, 1)),  # no more shards than GPUs: one on each, not all on one
        (16, 4, 6, (6, 16 / 6, 0.5)),
        (16, 4, 1, (1, 16, 1)),
    ],
)
def test_workers_share_gpus_by_default(
    cores: float, devices: float, shards: int, expected: tuple[int, float, float]
) -> None:
    assert Resources().split(cores, devices, shards) == expected
    workers, _, gpus = expected
    assert workers <= devices * int(1 / gpus), "Ray could not place them all"


def test_workers_that_are_asked_for_spread_over_the_gpus() -> None:
    assert Resources(workers=4).split(cores=16, devices=4, shards=100) == (4, 4, 1)
    assert Resources(workers=8).split(cores=16, devices=4, shards=100) == (8, 2, 0.5)
    assert Resources(workers=1).split(cores=16, devices=1, shards=100) == (1, 16, 1)
