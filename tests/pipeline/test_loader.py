"""MaskedViews: sample order, the parts of the ranks, and the state."""

import dataclasses
import logging
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.gpu_loader import take
from pipeline import Batch, MaskedViews, assemble, crop
from schemas import ShardDataset
from tests.forked import run_forked
from tests.pipeline.conftest import (
    BATCH,
    CROP,
    SAMPLES,
    STILL,
    count_threads_left_by,
    interrupt_next,
    same,
    small,
    views_of,
)


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.sample_keys or []]


@pytest.mark.parametrize("name", ["hp", "blur", "mean", "mscn", "none"])
def test_what_a_batch_is(dataset: ShardDataset, name: str) -> None:
    batch = next(iter(views_of(dataset, name)))
    images = [batch.query, batch.key]
    if name in ("hp", "blur", "mean"):
        assert batch.hard_negative is not None
        images.append(batch.hard_negative)
    for image in images:
        assert image.dtype == torch.float32
        assert image.shape == (BATCH, 3, CROP, CROP)
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.isfinite().all()
    assert batch.label.dtype == torch.int64
    table = dataset.samples.to_pydict()
    labels = dict(zip(table["key"], table["label"], strict=True))
    assert batch.label.tolist() == [labels[key] for key in batch.sample_keys or []]
    assert batch.query_mask is None
    assert batch.query_saliency is None


def test_extras_are_there_when_asked_for_and_change_nothing_else(dataset: ShardDataset) -> None:
    extras = ("masks", "saliency", "windows", "keys")
    bare, full = (next(iter(views_of(dataset, report=report))) for report in ((), extras))
    assert bare.sample_keys is None
    assert torch.equal(bare.query, full.query)
    assert full.query_mask is not None
    assert full.hard_negative_mask is not None
    assert full.query_mask.shape == full.hard_negative_mask.shape == bare.query.shape
    assert full.query_mask.dtype == torch.bool
    assert full.query_saliency is not None
    assert full.query_saliency.shape == (BATCH, 7, 7)
    assert full.query_window is not None
    assert full.query_window.shape == (BATCH, 4)


def test_an_epoch_has_no_sample_twice_and_counts_what_it_leaves_out(
    dataset: ShardDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pipeline.loader"):
        views = views_of(dataset, "none")
    assert len(views) == SAMPLES // BATCH == 5
    assert views.dropped == SAMPLES - 40 == 5
    assert "dropped per epoch (different ones each epoch): 5 samples" in caplog.text
    epochs = [keys(list(views)) for _ in range(4)]
    assert all(len(epoch) == len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4, "the order repeats"
    assert len(set.union(*map(set, epochs))) == SAMPLES, "the same samples are always left out"


def test_the_same_seed_gives_the_same_batches(dataset: ShardDataset) -> None:
    one, two = (take(views_of(dataset), 7) for _ in range(2))
    assert same(one, two)
    other = take(views_of(dataset, seed=1), 7)
    assert keys(one) != keys(other)
    assert not any(torch.equal(a.query, b.query) for a, b in zip(one, other, strict=True))


def test_each_epoch_and_step_draws_anew(dataset: ShardDataset) -> None:
    recipe = small("mean", **STILL)
    views = MaskedViews(dataset.url, recipe, 45, device="cpu", report=("masks", "keys"))
    seen = {}
    for batch in take(views, 3):
        assert batch.query_mask is not None
        for key, mask in zip(batch.sample_keys or [], batch.query_mask, strict=True):
            seen.setdefault(key, []).append(mask)
    repeats = [torch.equal(masks[0], masks[1]) for masks in seen.values()]
    assert sum(repeats) <= 5  # of 45: only masks of two or three cells may be equal by chance


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 6, 9, 10])
def test_resume_is_exact(dataset: ShardDataset, stop: int) -> None:
    # epochs have five steps: stop before, inside and at the end of the first, and in the second
    views = views_of(dataset)
    take(views, stop)
    state = pickle.loads(pickle.dumps(views.state_dict()))
    expected = take(views, 12 - stop)
    resumed = views_of(dataset)
    resumed.load_state_dict(state)
    assert (resumed.epoch, resumed.step) == divmod(stop, 5)
    assert same(take(resumed, 12 - stop), expected)


def test_a_loaded_state_can_be_saved_again_before_the_first_batch(dataset: ShardDataset) -> None:
    views = views_of(dataset)
    take(views, 2)
    middle = views_of(dataset)
    middle.load_state_dict(views.state_dict())
    last = views_of(dataset)
    last.load_state_dict(middle.state_dict())
    assert same(take(last, 4), take(views, 4))


def test_taking_the_state_changes_nothing(dataset: ShardDataset) -> None:
    watched, plain = views_of(dataset), views_of(dataset)
    batches = []
    for _ in range(7):
        watched.state_dict()
        batches += take(watched, 1)
    assert same(batches, take(plain, 7))


def test_an_iteration_that_was_left_continues(dataset: ShardDataset) -> None:
    views = views_of(dataset)
    for _ in views:
        break
    assert (views.epoch, views.step) == (0, 1)
    assert len(list(views)) == 4
    assert (views.epoch, views.step) == (1, 0)
    assert len(list(views)) == 5


def test_an_interrupt_loses_no_batch(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(views_of(dataset), 4)
    views = views_of(dataset)
    before = take(views, 1)
    interrupt_next(views, monkeypatch)
    assert (views.epoch, views.step) == (0, 1)
    assert same(expected, before + take(views, 3))


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 8), (3, 7), (4, 3), (5, 9)])
def test_ranks_share_an_epoch_evenly(
    dataset: ShardDataset, world_size: int, batch_size: int
) -> None:
    options = {"world_size": world_size, "batch_size": batch_size}
    ranks = [views_of(dataset, "none", rank=rank, **options) for rank in range(world_size)]
    steps = SAMPLES // world_size // batch_size
    assert {len(views) for views in ranks} == {steps}
    assert {views.dropped for views in ranks} == {SAMPLES - steps * batch_size * world_size}
    for _ in range(3):
        shares = [keys(list(views)) for views in ranks]
        assert {len(share) for share in shares} == {steps * batch_size}
        assert len(set.union(*map(set, shares))) == steps * batch_size * world_size


def by_sample(batches: list[Batch]) -> dict[str, dict[str, torch.Tensor]]:
    """Return all views and parameters of each sample, by its key."""
    actual = {}
    for batch in batches:
        assert batch.sample_keys is not None
        size = len(batch.sample_keys)
        for row, key in enumerate(batch.sample_keys):
            actual[key] = {
                field.name: getattr(batch, field.name)[row::size]
                for field in dataclasses.fields(Batch)
                if isinstance(getattr(batch, field.name), torch.Tensor)
            }
            for name in ("query_photometric", "key_photometric"):
                drawn = dataclasses.asdict(getattr(batch, name))
                actual[key] |= {f"{name}.{k}": value[row] for k, value in drawn.items()}
    return actual


ALL = ("masks", "saliency", "windows", "crops", "photometric", "keys")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hp", "blur", "mean", "mscn", "maskco"])
def test_a_sample_looks_the_same_whatever_batch_rank_and_thread_it_is_in(
    dataset: ShardDataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare views, masks, windows and colors of 40 samples of the second epoch bit for bit."""

    def epoch(batch_size: int, world_size: int, threads: int) -> dict:
        for module in (assemble, crop):
            monkeypatch.setattr(module, "get_threads", lambda: ThreadPoolExecutor(threads))
        batches = []
        for rank in range(world_size):
            views = views_of(
                dataset, name, batch_size=batch_size, rank=rank, world_size=world_size, report=ALL
            )
            views.load_state_dict({**views.state_dict(), "epoch": 1})
            batches += list(views)
        return by_sample(batches)

    one = epoch(8, 1, 1)
    for options in ((4, 2, 1), (20, 2, 2), (5, 1, 2), (1, 8, 2)):
        other = epoch(*options)
        shared = one.keys() & other.keys()
        assert len(shared) >= 35
        for key in shared:
            for field, value in one[key].items():
                assert torch.equal(value, other[key][field]), (options, key, field)


@pytest.mark.slow
def test_any_world_size_resumes_from_any_step(dataset: ShardDataset) -> None:
    """Global batches of 12 on 1, 2, 3, 4 and 6 ranks in turn equal those of one rank."""
    undisturbed = take(views_of(dataset, batch_size=12), 10)
    state = views_of(dataset, batch_size=12).state_dict()
    for step, world_size in enumerate((1, 2, 4, 3, 6, 1, 3, 2)):
        ranks = [
            views_of(dataset, rank=rank, world_size=world_size, batch_size=12 // world_size)
            for rank in range(world_size)
        ]
        batches = []
        for views in ranks:
            views.load_state_dict(pickle.loads(pickle.dumps(state)))
            batches += take(views, 1)
        assert keys(batches) == undisturbed[step].sample_keys
        for field in ("query", "key", "hard_negative", "label"):
            whole = torch.cat([getattr(batch, field) for batch in batches])
            assert torch.equal(whole, getattr(undisturbed[step], field)), (step, field)
        states = [views.state_dict() for views in ranks]
        assert all(other == states[0] for other in states), "ranks disagree"
        state = states[0]


def test_another_global_batch_resumes_between_epochs(dataset: ShardDataset) -> None:
    one = views_of(dataset, batch_size=8)
    take(one, len(one))
    other = views_of(dataset, batch_size=12)
    other.load_state_dict(one.state_dict())
    assert (other.epoch, other.step) == (1, 0)
    fresh = views_of(dataset, batch_size=12)
    take(fresh, len(fresh))
    assert same(take(other, 4), take(fresh, 4))


def version_1(views: MaskedViews, epoch: int, step: int) -> dict:
    """Return the state of a loader of version 1, which used DALI's reader."""
    own = views.state_dict()["fingerprint"]
    recipe = {f"recipe.{k}": str(v) for k, v in dataclasses.asdict(views.recipe).items()}
    del recipe["recipe.region_choice"]  # early states have no regions
    fingerprint = {"dataset": own["dataset"], "seed": own["seed"], **recipe}
    return {
        "version": 1,
        "fingerprint": fingerprint
        | {"world_size": 2, "batch_size": BATCH // 2, "rank": 0, "device": "cuda", "dali": "2.0"},
        "epoch": epoch,
        "step": step,
        "begun": 0,
        "pipeline": b"",
    }


def test_a_state_of_version_1_resumes(
    dataset: ShardDataset, caplog: pytest.LogCaptureFixture
) -> None:
    views = views_of(dataset)
    views.load_state_dict(version_1(views, epoch=3, step=0))
    assert (views.epoch, views.step) == (3, 0)
    assert caplog.text == ""
    views.load_state_dict(version_1(views, epoch=3, step=2))
    assert (views.epoch, views.step) == (3, 2)
    assert "up to 2 batches of samples repeat in this epoch" in caplog.text


def test_a_loader_that_is_dropped_ends_its_threads(dataset: ShardDataset) -> None:
    before = threading.active_count()
    for _ in range(3):
        views = views_of(dataset)
        next(iter(views))
        views.close()
    assert threading.active_count() <= before + 1  # the thread pool for pixels stays


@pytest.mark.parametrize("closes", [True, False])
def test_dalis_threads_end_with_the_loader(dataset: ShardDataset, closes: bool) -> None:
    closed = []

    def read() -> None:
        views = views_of(dataset)
        next(iter(views))
        if closes:
            views.close()
            closed.append(views)  # so that it is not dropped as well

    assert count_threads_left_by(read) == 0


@pytest.mark.parametrize("url", ["file://{}", "~/{name}", "{name}"])
def test_every_way_to_name_a_local_folder(
    dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    folder = Path(dataset.url)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    views = MaskedViews(url.format(folder, name=folder.name), small("mean"), BATCH, "cpu")
    monkeypatch.chdir("/")  # the folder is found again wherever the program goes
    assert torch.equal(next(iter(views)).query, take(views_of(dataset, "mean"), 1)[0].query)


@pytest.mark.slow
def test_importing_does_not_touch_cuda() -> None:
    code = "import pipeline, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


THREADS = """
import threading, torch
torch.set_num_threads(3)
from pipeline.host_threads import get_threads
pool = get_threads()
assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {1}
assert torch.get_num_threads() == 3, torch.get_num_threads()
seen = []
later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
later.start()
later.join()
assert seen == [3], seen
"""


@pytest.mark.slow
def test_the_pool_of_the_views_does_not_change_the_callers_threads_or_later_ones() -> None:
    """In a fresh process: torch applies the number only when a thread first asks for it."""
    subprocess.run([sys.executable, "-c", THREADS], check=True)


FORK = """
import os, signal, sys
from pipeline import MaskedViews
from tests.pipeline.conftest import small

def print_sum():
    batch = next(iter(MaskedViews(sys.argv[1], small("mean"), 8, "cpu")))
    print(batch.query.double().sum().item(), flush=True)

print_sum()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends it if it hangs
    print_sum()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "it hangs"
"""


def test_a_process_that_is_forked_after_a_loader_was_used_has_its_own_pool(
    dataset: ShardDataset, tmp_path: Path
) -> None:
    process = run_forked(FORK, [str(dataset.url)], tmp_path)
    assert process.returncode == 0, process.stderr
    first, second = process.stdout.split()
    assert first == second
