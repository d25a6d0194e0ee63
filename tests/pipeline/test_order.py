"""The sample order: each rank's samples, their frequency, and reproducibility."""

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.order import DiskOrder, SampleOrder, deal, permute
from pipeline.shuffle_quality import describe_shuffle
from schemas import UserError

SIZES = [7, 20, 20, 0, 20, 13, 20, 20, 1, 20, 20, 20]
"""Shard sizes of 181 samples; one shard is empty."""


def epoch_of(order: SampleOrder, epoch: int, world_size: int = 1) -> list[np.ndarray]:
    """Return the global batches of an epoch, concatenated from the ranks' slices."""
    return [
        np.concatenate([order.batch(epoch, step, rank, world_size) for rank in range(world_size)])
        for step in range(order.steps)
    ]


@pytest.mark.parametrize("batch_size", [1, 7, 12, 181])
@pytest.mark.parametrize("shuffle_shards", [1, 3, 100])
def test_an_epoch_has_every_sample_once_but_those_that_fill_no_batch(
    batch_size: int, shuffle_shards: int
) -> None:
    order = SampleOrder(SIZES, batch_size, shuffle_shards=shuffle_shards)
    assert order.dropped == 181 % batch_size
    for epoch in range(3):
        seen = np.concatenate(epoch_of(order, epoch))
        assert len(seen) == 181 - order.dropped
        assert len(np.unique(seen)) == len(seen)
        assert (seen >= 0).all()
        assert (seen < 181).all()


def test_any_world_size_that_divides_the_batch_gives_the_same_batches() -> None:
    order = SampleOrder(SIZES, 12, seed=5)
    whole = epoch_of(order, 4)
    for world_size in (2, 3, 4, 6, 12):
        for one, other in zip(whole, epoch_of(order, 4, world_size), strict=True):
            assert np.array_equal(one, other)
    with pytest.raises(UserError, match="12 samples cannot be shared equally by 5 ranks"):
        order.batch(0, 0, 0, 5)


def test_steps_may_be_asked_for_in_any_order() -> None:
    order, fresh = (SampleOrder(SIZES, 12, seed=5, shuffle_shards=2) for _ in range(2))
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    places = [(epoch, step) for epoch in range(3) for step in range(order.steps)]
    for epoch, step in np.random.default_rng(0).permutation(places).tolist():
        assert np.array_equal(fresh.batch(epoch, step), epochs[epoch][step])


def test_epochs_seeds_and_windows_give_other_orders() -> None:
    settings = itertools.product(range(3), range(3), (1, 4))
    orders = {
        tuple(np.concatenate(epoch_of(SampleOrder(SIZES, 10, seed, window), epoch)))
        for epoch, seed, window in settings
    }
    assert len(orders) == 18


def test_a_window_is_left_before_the_next_begins() -> None:
    order = SampleOrder([10] * 30, 10, seed=1, shuffle_shards=5)
    for epoch in range(2):
        shards = order.locate(np.concatenate(epoch_of(order, epoch)))[0].reshape(6, 50)
        windows = [set(window) for window in shards.tolist()]
        assert all(len(window) == 5 for window in windows)
        assert set.union(*windows) == set(range(30))
        # a window mixes the samples of all its shards
        assert all(len(set(window[:15])) >= 4 for window in shards.tolist())


@pytest.mark.slow
def test_neighbors_and_epochs_are_independent() -> None:
    """Test the positions of two samples, and of one sample in two epochs, for 3,000 seeds."""
    trials, places = 3000, []
    for seed in range(trials):
        order = SampleOrder([8] * 4, 1, seed, shuffle_shards=2)
        rank = [np.argsort(np.concatenate(epoch_of(order, epoch))) for epoch in range(2)]
        places.append([rank[0][0], rank[0][1], rank[1][0], rank[0][31]])
    table = np.array(places, float)
    for column in table.T:  # positions are equally frequent: chi-square with 31 degrees of freedom
        counts = np.bincount(column.astype(int), minlength=32)
        assert ((counts - trials / 32) ** 2 / (trials / 32)).sum() < 31 + 6 * np.sqrt(62)
    correlation = np.corrcoef(table.T)
    assert abs(correlation[0, 2]) < 5.5 / trials**0.5  # the same sample in the next epoch
    # samples of one shard share its window, which has half of the variance of a position
    inside = table % 16
    assert np.abs(np.corrcoef(inside.T) - np.eye(4)).max() < 1.2 * 5.5 / trials**0.5 + 1 / 15


@pytest.mark.parametrize("streams", [2, 4, 8])
def test_each_shard_is_read_by_one_node(streams: int) -> None:
    sizes = np.random.default_rng(streams).integers(50, 100, 64)
    order = SampleOrder(sizes, 64, seed=2, streams=streams)
    for epoch in range(2):
        whole = epoch_of(order, epoch)
        assert len(np.unique(np.concatenate(whole))) == 64 * order.steps
        for nodes in (1, 2, 4, 8):
            if nodes > streams:
                continue
            readers: dict[int, set[int]] = {}
            for node, step in itertools.product(range(nodes), range(order.steps)):
                for shard in order.locate(order.batch(epoch, step, node, nodes))[0].tolist():
                    readers.setdefault(shard, set()).add(node)
            assert len(readers) == 64
            assert all(len(of_shard) == 1 for of_shard in readers.values())
            assert all(
                np.array_equal(one, other)
                for one, other in zip(whole, epoch_of(order, epoch, nodes), strict=True)
            )
    # two ranks per node: the ranks of a node share its streams
    for one, other in zip(whole, epoch_of(order, 1, 2 * streams), strict=True):
        assert np.array_equal(one, other)


def test_streams_are_balanced_to_one_shard() -> None:
    sizes = np.random.default_rng(0).integers(0, 100, 500)
    dealt = deal(sizes, 7, seed=3)
    assert sorted(np.concatenate(dealt)) == np.flatnonzero(sizes).tolist()
    lengths = [sizes[shards].sum() for shards in dealt]
    assert max(lengths) - min(lengths) <= 100
    order = SampleOrder(sizes, 7 * 9, seed=3, streams=7)
    assert order.steps == min(lengths) // 9
    assert order.dropped == sizes.sum() - order.steps * 63


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize(("sizes", "batch_size"), [(SIZES, 8), ([8] * 10, 32)])
def test_windows_name_what_batches_need_in_the_order_of_need(
    sizes: Sequence[int], batch_size: int, streams: int
) -> None:
    """With equal sizes and one stream, an epoch ends where a window begins, which is not needed."""
    order = SampleOrder(sizes, batch_size, seed=3, shuffle_shards=2, streams=streams)
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            for start in (0, 5, order.steps - 1):
                windows = order.windows(0, start, rank, world_size)
                known: list[int] = []
                position = 0
                for step in range(start, order.steps):
                    shards = order.locate(order.batch(0, step, rank, world_size))[0]
                    needed = set(shards.tolist())
                    while needed - set(known):
                        window = next(windows)
                        assert window.epoch == 0
                        assert window.start >= position
                        position = window.start
                        known += window.shards.tolist()
                following = next(windows)
                while following.epoch == 0:  # of other ranks
                    assert position <= following.start < order.steps * batch_size // streams
                    position, following = following.start, next(windows)
                assert following[:2] == (1, 0)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 20), (2, 7), (7, 20), (181, 1)])
def test_the_order_on_disk_has_every_sample_once(world_size: int, batch_size: int) -> None:
    order = DiskOrder(SIZES, batch_size)
    seen = []
    for rank in range(world_size):
        first, end = order.find_part(rank, world_size)
        steps = -(-(end - first) // batch_size)
        batches = [order.batch(0, step, rank, world_size) for step in range(steps)]
        seen += np.concatenate(batches).tolist()
        shards = set(order.locate(np.concatenate(batches))[0].tolist())
        announced = [w.shards[0] for w in order.windows(0, 0, rank, world_size)]
        assert shards == set(announced) - {s for s in announced if SIZES[s] == 0}
    assert seen == list(range(181))


@pytest.mark.slow
def test_a_billion_samples_are_ordered_without_listing_them() -> None:
    code = (
        "import resource, numpy as np\n"
        "from pipeline.order import SampleOrder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "order = SampleOrder(np.full(100_000, 10_000), 4096, seed=1)\n"
        "batch = order.batch(57, 200_000, 3, 8)\n"
        "next(order.windows(57, 200_000, 3, 8))\n"
        "assert len(set(batch.tolist())) == 512 and order.samples == 10**9\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # kB; all sample numbers would take 8 GB


# sha256 of the first results of this code, on x86-64 with NumPy 2
GOLDEN = {
    (1, 16): "e370c39ede8818f0",
    (4, 2): "222e7deca0bd67a5",
}


@pytest.mark.parametrize(("streams", "shuffle_shards"), GOLDEN)
def test_the_order_never_changes(streams: int, shuffle_shards: int) -> None:
    order = SampleOrder(SIZES, 12, 7, shuffle_shards, streams)
    batches = [batch for epoch in (0, 1, 1000) for batch in epoch_of(order, epoch)]
    digest = hashlib.sha256(np.stack(batches).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == GOLDEN[streams, shuffle_shards]


def test_a_permutation_is_a_stable_sort_of_philox_words() -> None:
    key, counter = np.array([9, 2**64 - 1], np.uint64), np.array([0, 4, 5, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(1000).tolist()
    expected = sorted(range(1000), key=lambda place: words[place])
    assert permute(1000, 9, 4, 5).tolist() == expected


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_philox_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=r"the seed is in 0 \.\. 2\^64 - 1"):
        SampleOrder([8], 4, seed)


def test_no_samples_to_analyze_are_refused() -> None:
    with pytest.raises(UserError, match="--samples is 0; it must be at least 1"):
        describe_shuffle("memory://nowhere", 8, samples=0)
