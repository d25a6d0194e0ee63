"""Ranks that come and go: the batches are those of an undisturbed run."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from bench.object_store import ObjectServer
from pipeline import Batch, MaskedViews
from pipeline.order import SampleOrder
from schemas import ShardDataset
from tests.train.ranks import add_tiny_encoders
from tests.train.runs import command, metrics
from tests.train.torchrun import Torchrun, find_free_endpoint
from train.distributed import world_size
from train.preemption import PreemptionListener
from train.trainer import MetricsBuffer

BATCH, EPOCHS = 8, 3
OPTIONS = {
    "--encoder": "tiny",
    "--epochs": str(EPOCHS),
    "--checkpoint-steps": "1",
    "--log-steps": "1",
    "--keep-checkpoints": "2",
}


@dataclass(frozen=True)
class NotedTraining:
    """Adds the tiny encoders, notes the samples that each rank is fed, and kills ranks on request.

    Attributes:
        notes: folder with a file for each rank.
        stop: step after whose checkpoint each rank ends at once, as killed processes do; 0: never.
        paused_size: world size with which a rank trains no step until it is told to stop; 0: none.
    """

    notes: Path
    stop: int = 0
    paused_size: int = 0

    def __call__(self) -> None:
        next_batch, add = MaskedViews._next, MetricsBuffer.add
        poll = PreemptionListener.poll_all_ranks

        def noting(views: MaskedViews) -> Batch:
            place = [views.epoch, views.step, views.rank, views.world_size]
            batch = next_batch(views)
            with (self.notes / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps([*place, batch.sample_keys]) + "\n")
            return batch

        def dying(buffer, scalars, waited, **known):
            add(buffer, scalars, waited, **known)
            if known["step"] == self.stop + 1:  # the checkpoint of step `stop` is written
                os._exit(9)

        def pausing(listener: PreemptionListener) -> bool:
            while world_size() == self.paused_size and not listener.is_requested:
                time.sleep(0.01)
            return poll(listener)

        add_tiny_encoders()
        MaskedViews._next = noting
        PreemptionListener.poll_all_ranks = pausing
        if self.stop:
            MetricsBuffer.add = dying


def start(
    data: str,
    out: Path,
    stop: int,
    *agent: str,
    options: Sequence[str] = (),
    paused_size: int = 0,
) -> Torchrun:
    notes = out.parent / "notes"
    notes.mkdir(exist_ok=True)
    log = out.parent / f"log-{len(list(out.parent.glob('log-*')))}"
    log.touch()
    training = [*command(data, out, **OPTIONS), *options]
    return Torchrun(agent, training, log, NotedTraining(notes, stop, paused_size))


def fed(out: Path) -> dict[tuple[int, int], dict[int, dict[int, list[str]]]]:
    """Return (epoch, step) -> world size -> rank -> keys."""
    found: dict = {}
    for path in (out.parent / "notes").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            epoch, step, rank, size, keys = json.loads(line)
            found.setdefault((epoch, step), {}).setdefault(size, {})[rank] = keys
    return found


def assert_every_batch_was_whole(data: str, out: Path) -> set[int]:
    """Check that all ranks of some world size fed each global batch; return these sizes."""
    dataset = ShardDataset.open(data)
    keys = np.array(dataset.samples["key"].to_pylist())
    order = SampleOrder([row.samples for row in dataset.shards], BATCH)
    found, sizes = fed(out), set()
    for epoch in range(EPOCHS):
        for step in range(order.steps):
            expected = keys[order.batch(epoch, step)].tolist()
            whole = []
            for size, ranks in found[epoch, step].items():
                for rank, part in ranks.items():  # also for a batch that not all ranks reached
                    share = BATCH // size
                    assert part == expected[rank * share : (rank + 1) * share]
                if len(ranks) == size:
                    whole.append(size)
            assert whole, f"epoch {epoch}, step {step}"
            sizes |= set(whole)
    return sizes


@pytest.fixture(scope="module")
def undisturbed(shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of one undisturbed process; its encoder has no batch statistics."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(shards, out, 0, "--standalone", "--nproc-per-node", "1")
    assert process.wait() == 0, process.said
    assert assert_every_batch_was_whole(shards, out) == {1}
    return [row["loss"] for row in metrics(out)]


@pytest.mark.slow
def test_a_run_resumes_with_one_and_with_four_ranks(
    shards: str, tmp_path: Path, undisturbed: list[float]
) -> None:
    """Run two ranks for 2 steps, one up to step 4, four to the end; an epoch has three steps.

    The two and the one read the shards from the disk, the four from a server.
    """
    out, cache = tmp_path / "run", ("--cache", str(tmp_path / "cache"))
    with ObjectServer(Path(shards).parent) as server:
        remote = f"{server.url}/{Path(shards).name}"
        for data, size, stop, options in (
            (shards, 2, 2, ()),
            (shards, 1, 4, ()),
            (remote, 4, 0, cache),
        ):
            process = start(
                data, out, stop, "--standalone", "--nproc-per-node", str(size), options=options
            )
            assert (process.wait() == 0) == (stop == 0), process.said
    assert "resumes after step 4 of 9, 1 -> 4 processes" in process.said
    assert assert_every_batch_was_whole(shards, out) == {1, 2, 4}
    assert len(list((tmp_path / "cache").glob("*.tar"))) == len(ShardDataset.open(shards).shards)
    losses = [row["loss"] for row in metrics(out)]
    np.testing.assert_allclose(losses, undisturbed, rtol=2e-4)


@pytest.mark.slow
def test_torchrun_continues_when_a_node_is_lost_and_when_one_joins(
    shards: str, tmp_path: Path, undisturbed: list[float]
) -> None:
    """Start two agents of two ranks each, kill one, and start another when two ranks train."""
    out = tmp_path / "run"
    agent = (
        "--nnodes", "1:2", "--nproc-per-node", "2", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-id", "elastic",
        "--rdzv-endpoint", find_free_endpoint(), "--local-addr", "127.0.0.1",
    )  # fmt: skip
    # an agent that a busy machine stalls for this long counts as lost
    waits = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=10"

    def start_agent(is_host: int) -> Torchrun:
        conf = f"{waits},is_host={is_host}"
        return start(shards, out, 0, *agent, "--rdzv-conf", conf, paused_size=2)

    first, second = start_agent(1), start_agent(0)  # the first hosts the store of the rendezvous
    first.wait_until(
        lambda: (
            list((out / "checkpoints").glob("step-*"))
            and any(4 in sizes for sizes in fed(out).values())
        )  # not the first agent alone
    )
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    first.wait_until(lambda: "4 -> 2 processes" in first.said)
    third = start_agent(0)
    assert first.wait() == 0, first.said
    assert third.wait() == 0, third.said
    assert "2 -> 4 processes" in first.said + third.said
    assert {2, 4} <= assert_every_batch_was_whole(shards, out)
    losses = [row["loss"] for row in metrics(out)]
    np.testing.assert_allclose(losses, undisturbed, rtol=2e-4)
