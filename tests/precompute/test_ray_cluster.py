"""Tests of Ray clusters: a job continues while nodes come and go; workers fit on the nodes."""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from ray._private.node import Node
from ray.cluster_utils import Cluster

from precompute.estimators import SpectralOptions
from precompute.job import Job, Resources, find_usable_resources, run_job
from precompute.plan import make_plan
from precompute.ray_cluster import UNUSED_SERVICES, disable_unused_services
from precompute.sources import SourceImage
from precompute.sources.demo import DemoScenes
from schemas import ShardDataset, UserError
from tests.precompute.conftest import without_ray
from tests.ray_workers import forked_workers
from tests.train.ranks import get_preloaded_context

pytestmark = pytest.mark.slow
# Ray's workers cannot import this file as a module
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHARDS = 60


class HeldScenes(DemoScenes):
    """Scenes that cannot be read once a third of the shards are written, until a file exists."""

    def __init__(self, out: Path) -> None:
        super().__init__("", "train", False)
        self.shards, self.release = out / "shards", out.with_suffix(".release")

    def read(self, image: SourceImage) -> bytes:
        while not self.release.exists() and len(list(self.shards.glob("*.parquet"))) >= SHARDS // 3:
            time.sleep(0.05)
        return super().read(image)


def job(out: Path) -> Job:
    source = HeldScenes(out)
    images = [image for image in source.images() if isinstance(image, SourceImage)][: SHARDS * 4]
    plan = make_plan(images, seed=0, shard_samples=4)
    return Job("demo", "train", source, plan, [], SpectralOptions(), 0, str(out), 4)


def run_here(out: Path, address: str, environment: dict[str, str]) -> None:
    """Run the job in this process, with the environment of the test."""
    os.environ.clear()
    os.environ.update(environment)
    run_job(job(out), Resources(address, workers=2))


def test_nodes_come_and_go_in_the_middle_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has no CPUs for work; a node joins, then the node that the job began on dies."""
    # the processes of this cluster have no token, even if the home folder has a token file
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default all other tests come first
    # five seconds, so that a node that waits for a CPU core is not declared dead
    quickly = {"health_check_period_ms": 500, "health_check_failure_threshold": 10}
    head = {"num_cpus": 0, "_system_config": quickly}
    workers = contextlib.ExitStack()
    workers.enter_context(forked_workers())
    # without hooks at exit, which Ray can set only where the main thread adds a node
    with disable_unused_services():
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    first = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    one, two = tmp_path / "one", tmp_path / "two"
    one.with_suffix(".release").touch()
    built: list[int] = []

    def wait_for_shards(count: int) -> None:
        while len(list(two.glob("shards/*.parquet"))) < count:
            time.sleep(0.01)
        built.append(len(list(two.glob("shards/*.parquet"))))

    def change_nodes() -> None:
        wait_for_shards(2)
        cluster.add_node(num_cpus=1)
        wait_for_shards(6)
        cluster.remove_node(first, allow_graceful=False)
        two.with_suffix(".release").touch()

    changes = threading.Thread(target=change_nodes, daemon=True)
    # in a process of its own: this one may be connected to a Ray that other tests share
    driver = get_preloaded_context().Process(
        target=run_here, args=(two, cluster.address, dict(os.environ))
    )
    try:
        changes.start()
        driver.start()
        driver.join(300)
        assert driver.exitcode == 0
        changes.join(10)
        assert len(built) == 2, "the first node was not killed"
        assert built[1] < SHARDS, "the first node was killed too late"
    finally:
        driver.kill()
        cluster.shutdown()
        workers.close()
    dataset = ShardDataset.open(two)
    assert dataset.verify().clean
    assert dataset.digest == without_ray(job(one)).digest
    for path in one.glob("shards/*"):
        assert path.read_bytes() == (two / "shards" / path.name).read_bytes()


@pytest.mark.usefixtures("shared_ray")
def test_a_local_ray_starts_only_what_a_job_uses() -> None:
    """The processes that the raylet starts itself are not among them."""
    node = ray._private.worker._global_node
    assert set(node.all_processes) == {"gcs_server", "raylet"}
    for name in UNUSED_SERVICES:
        assert callable(vars(Node).get(name)), f"this version of Ray has no {name}"
        assert vars(Node)[name].__name__ == name, "still replaced after the start"


def test_a_cluster_that_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # whether other tests of this process share a Ray or not
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_job(job(tmp_path), Resources("127.0.0.1:1"))


def test_a_worker_cannot_have_more_than_there_is() -> None:
    assert Resources().split(cores=8, devices=0, shards=100) == (8, 1, 0)
    assert Resources(cpus=4).split(cores=8, devices=0, shards=100) == (2, 4, 0)
    assert Resources(gpus=0.5).split(cores=16, devices=4, shards=100) == (8, 2, 0.5)
    assert Resources(workers=4).split(cores=2, devices=0, shards=3) == (3, 2 / 3, 0)
    assert Resources(workers=8, gpus=1).split(cores=16, devices=4, shards=100) == (8, 2, 0.5)
    with pytest.raises(UserError, match="0 CPUs and 2 GPUs, but the cluster has 8 and 1"):
        Resources(gpus=2).split(cores=8, devices=1, shards=3)


@pytest.mark.parametrize(
    ("cores", "devices", "shards", "expected"),
    [
        (16, 1, 100, (3, 16 / 3, 0.3333)),  # three per GPU if each has two cores or more
        (4, 1, 100, (2, 2, 0.5)),
        (2, 1, 100, (1, 2, 1)),
        (1, 1, 100, (1, 1, 1)),
        (64, 8, 1000, (24, 64 / 24, 0.3333)),
        (32, 8, 1000, (16, 2, 0.5)),
        (16, 4, 4, (4, 4, 1)),  # as many shards as GPUs: one on each, not all on one
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


def node(cpu: float, gpu: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpu, **({"GPU": gpu} if gpu else {})}}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(8)], (8, 0, 8)),
        ([node(0), node(8), node(4), node(64, alive=False)], (12, 0, 8)),  # a head without CPUs
        ([node(16, 2)], (16, 2, 16)),
        ([node(128), node(8, 1), node(8, 1)], (16, 2, 8)),  # CPU nodes beside GPU nodes
        ([node(4, 1), node(64, 1)], (8, 2, 64)),  # a worker must fit on both
        ([node(8, 8), node(96, 4)], (12, 12, 96)),
        ([node(0)], (1, 0, 1)),
    ],
)
def test_workers_fit_on_every_node_that_they_may_go_to(nodes: list, expected: tuple) -> None:
    cores, devices, node_cores = find_usable_resources(nodes)
    assert (cores, devices, node_cores) == expected
    workers, cpus, gpus = Resources().split(cores, devices, 1000, node_cores)
    alive = [n["Resources"] for n in nodes if n["Alive"]]
    homes = [home for home in alive if bool(home.get("GPU")) == bool(devices)]
    fitting = sum(
        min(int(home["CPU"] / cpus + 1e-9), int(home["GPU"] / gpus + 1e-9) if gpus else 10**6)
        for home in homes
    )
    assert fitting >= workers or homes == [{"CPU": 0}]


def test_the_last_shard_fits_on_one_node() -> None:
    """A worker must not request the cores of all nodes: Ray would wait forever for such a node."""
    assert Resources().split(*find_usable_resources([node(2), node(2)])[:2], 1, 2) == (1, 2, 0)
    assert Resources().split(16, 2, 1, 8) == (1, 8, 1)
    with pytest.raises(UserError, match="its largest node 2 CPUs"):
        Resources(cpus=3).split(4, 0, 10, 2)
