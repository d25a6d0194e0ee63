"""Tests of plans: every image occurs once, all are shuffled, equal inputs give equal plans."""

import random

import pytest

from precompute.plan import make_plan
from precompute.sources import SourceImage

IMAGES = [SourceImage(f"key{i:03d}", f"{i}.jpg", i // 50) for i in range(203)]


@pytest.mark.parametrize("shard_samples", [1, 7, 50, 203, 1000])
def test_every_image_is_planned_once_in_shards_of_even_size(shard_samples: int) -> None:
    plan = make_plan(IMAGES, seed=0, shard_samples=shard_samples)
    assert sorted(image for shard in plan.shards for image in shard) == IMAGES
    sizes = [len(shard) for shard in plan.shards]
    assert max(sizes) <= shard_samples
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(IMAGES) // shard_samples)
    assert plan.images == len(IMAGES)


def test_the_plan_does_not_depend_on_the_order_of_listing() -> None:
    shuffled = random.Random(0).sample(IMAGES, len(IMAGES))
    assert make_plan(shuffled, seed=0, shard_samples=50) == make_plan(
        IMAGES, seed=0, shard_samples=50
    )


def test_the_digest_tells_plans_apart() -> None:
    digests = {
        make_plan(IMAGES, seed=0, shard_samples=50).digest,
        make_plan(IMAGES, seed=1, shard_samples=50).digest,
        make_plan(IMAGES, seed=0, shard_samples=51).digest,
        make_plan(IMAGES[:-1], seed=0, shard_samples=50).digest,
        make_plan([*IMAGES[:-1], IMAGES[-1]._replace(label=9)], seed=0, shard_samples=50).digest,
    }
    assert len(digests) == 5


def test_classes_are_mixed_over_the_whole_dataset() -> None:
    """Each quarter of a plan of 203 images sorted by class has about a quarter of each class."""
    plan = make_plan(IMAGES, seed=0, shard_samples=51)
    for shard in plan.shards:
        for label in range(4):
            assert 4 <= sum(image.label == label for image in shard) <= 24


def test_limit_takes_the_first_of_the_shuffled_order() -> None:
    whole = make_plan(IMAGES, seed=0, shard_samples=1000)
    part = make_plan(IMAGES, seed=0, shard_samples=1000, limit=20)
    assert part.shards[0] == whole.shards[0][:20]


def test_no_images_make_no_shards() -> None:
    assert make_plan([], seed=0, shard_samples=10).shards == []
