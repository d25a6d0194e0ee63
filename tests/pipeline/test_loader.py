"""MaskedViews: order, shares of the ranks, state, and what it refuses."""

import dataclasses
import logging
import pickle
import subprocess
import sys

import pytest
import torch

from pipeline import Batch, MaskedViews
from pipeline.reader import parse_keys, parse_labels
from schemas import ShardDataset
from tests.pipeline.conftest import BATCH, CROP, SAMPLES, STILL, small, take, views_of


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.sample_keys or []]


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Bit for bit, in every field."""

    def equal(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # type: ignore[arg-type]

    return len(one) == len(other) and all(
        equal(getattr(a, field.name), getattr(b, field.name))
        for a, b in zip(one, other, strict=True)
        for field in dataclasses.fields(Batch)
    )


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
    assert "5 samples, other ones each epoch, are left out" in caplog.text
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
    assert sum(repeats) <= 5  # of 45: only masks of two or three cells may fall alike by chance


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 6, 9, 10])
def test_resuming_is_continuing(dataset: ShardDataset, stop: int) -> None:
    # epochs of five steps: stops before, inside, at the end and in the second epoch
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


def test_an_iteration_that_was_left_goes_on(dataset: ShardDataset) -> None:
    views = views_of(dataset)
    for _ in views:
        break
    assert (views.epoch, views.step) == (0, 1)
    assert len(list(views)) == 4
    assert (views.epoch, views.step) == (1, 0)
    assert len(list(views)) == 5


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


def test_ranks_draw_differently(dataset: ShardDataset) -> None:
    batches = [
        next(iter(views_of(dataset, rank=rank, world_size=2, report=("masks", "windows"))))
        for rank in range(2)
    ]
    windows = [batch.query_window for batch in batches]
    ratios = [batch.query_ratio for batch in batches]
    assert not (windows[0] == windows[1]).any()  # type: ignore[union-attr]
    assert not (ratios[0] == ratios[1]).any()  # type: ignore[union-attr]


def test_another_world_size_goes_on_between_epochs(dataset: ShardDataset) -> None:
    one = views_of(dataset, "none")
    take(one, len(one))
    state = one.state_dict()
    ranks = [
        views_of(dataset, "none", rank=rank, world_size=2, batch_size=BATCH) for rank in range(2)
    ]
    shares = []
    for views in ranks:
        views.load_state_dict(state)
        assert (views.epoch, views.step) == (1, 0)
        shares.append(keys(list(views)))
    assert len(set(shares[0] + shares[1])) == 2 * len(ranks[0]) * BATCH
    fresh = views_of(dataset, "none", rank=0, world_size=2)
    assert keys(list(fresh)) != shares[0], "the order of epoch 0 again"
    # and from there on the state is exact again
    saved = ranks[0].state_dict()
    resumed = views_of(dataset, "none", rank=0, world_size=2)
    resumed.load_state_dict(saved)
    assert same(take(resumed, 3), take(ranks[0], 3))


def test_importing_does_not_touch_cuda() -> None:
    code = "import pipeline, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def ascii_rows(words: list[str]) -> torch.Tensor:
    width = max(map(len, words))
    return torch.tensor([list(word.encode().ljust(width, b"\0")) for word in words]).byte()


def test_labels_are_read_from_ascii() -> None:
    words = ["0", "-1", "7", "999", "21841", "10"]
    assert parse_labels(ascii_rows(words)).tolist() == [int(word) for word in words]


def test_keys_are_read_from_the_source() -> None:
    words = ["/data/a.b:c/0.tar:512:key-1_x.jpg", "s3://bucket/1.tar:1024:k.saliency.png"]
    assert parse_keys(ascii_rows(words)) == ["key-1_x", "k"]
