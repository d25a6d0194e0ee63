"""Tests of plans made bucket by bucket: plans, rejects and shards equal those made in memory."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from precompute import plan_stages as stages
from precompute.bucket_plan import PartGroup, StoredListing, plan_in_buckets
from precompute.estimators import SpectralOptions
from precompute.job import Job
from precompute.plan import Plan, cut_shards, make_plan
from precompute.sources import Source, SourceImage, list_images, list_source, open_source
from precompute.sources.base import (
    REMOTE_READERS,
    LabeledText,
    PartedSource,
    digest_key,
)
from precompute.sources.trees import Folder
from precompute.stored_plan import StoredPlan, compute_digest, format_plan
from schemas import UserError
from schemas.storage import Store
from schemas.tables import Reject
from tests.conftest import encode, noise
from tests.precompute.conftest import build_folder, contents, run_here, without_ray, write
from tests.precompute.test_listing import make_tar, samples


class LocalRunner:
    """Runner in this process that passes the rows of each bucket in a random order."""

    def shuffle(
        self, source: Source, groups: list[PartGroup], place: str, seed: int, buckets: int
    ) -> set[str]:
        tables = [
            table
            for first, parts in reversed(groups)
            for table in stages.list_rows(source, first, parts, seed, buckets)
        ]
        rows = pa.concat_tables(tables)
        rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
        text_labels: set[str] = set()
        for bucket in rows.column("bucket").unique().to_pylist():
            written = stages.write_rows(rows.filter(pc.field("bucket") == bucket), place)
            text_labels |= set(json.loads(written.column("text_labels")[0].as_py()))
        return text_labels

    def map(
        self,
        function: Callable[..., Any],
        arguments: Iterable[tuple],
        max_in_flight: int | None = None,
    ) -> Iterator[Any]:
        return (function(*argument) for argument in arguments)


class Given(PartedSource):
    """Source of the given parts."""

    def __init__(self, parts: list[list[Any]], classes: tuple[str, ...] = ()):
        self.given = parts
        self.classes = classes

    def parts(self) -> list[str]:
        return [str(place) for place in range(len(self.given))]

    def list_part(self, part: str) -> Iterator[Any]:
        yield from self.given[int(part)]

    def number_labels(self, texts: Iterable[str]) -> tuple[dict[str, int], dict[str, str]]:
        self.classes = sorted(text for text in texts if text != "bad")
        return {name: label for label, name in enumerate(self.classes)}, {"bad": "no label"}

    def read(self, image: SourceImage) -> bytes:
        return encode(noise(len(image.location)))


def in_buckets(source: Source, place: Path, buckets: int = 16, **options: Any) -> StoredListing:
    return plan_in_buckets(source, str(place), LocalRunner(), buckets=buckets, **options)


def assert_equal(source: Source, place: Path, **options: Any) -> StoredPlan:
    """Assert that both ways of planning give the same plan, rejects, label counts and classes."""
    given = {"seed": 0, "shard_samples": 50, **options}
    buckets = given.pop("buckets", 16)
    images, rejects = list_images(list_source(source))
    expected, classes = make_plan(images, **given), list(source.classes)
    found = in_buckets(source, place, buckets, **given)
    assert found.plan.digest == expected.digest
    assert list(found.plan.shards) == expected.shards
    assert found.rejects == rejects
    assert found.labels == Counter(image.label for image in images)
    assert list(found.classes) == classes
    assert found.plan.images == expected.images
    shards = range(len(expected.shards))
    assert [found.plan.size(shard) for shard in shards] == [expected.size(s) for s in shards]
    return found.plan


def image(name: str, label: int = 0, annotation: str = "") -> SourceImage:
    return SourceImage(name.rpartition(".")[0].replace("/", "_"), name, label, annotation)


IMAGES = [image(f"{i % 5}/{i}.jpg", i % 5, f'["{i}"]') for i in range(503)]


@pytest.mark.parametrize(("buckets", "parts"), [(1, 1), (7, 3), (30, 70), (2, 503)])
def test_the_plan_is_that_of_one_process(tmp_path: Path, buckets: int, parts: int) -> None:
    source = Given([IMAGES[part::parts] for part in range(parts)], ("a", "b", "c", "d", "e"))
    assert_equal(source, tmp_path, buckets=buckets)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3, "limit": 100},
        {"shard_samples": 1, "limit": 90},
        {"shard_samples": 9999},
        {"limit": 1},
        {"limit": 502},
        {"limit": 9999},
    ],
)
def test_whatever_the_options(tmp_path: Path, options: dict[str, int]) -> None:
    assert_equal(Given([IMAGES]), tmp_path, **options)


def test_without_images(tmp_path: Path) -> None:
    plan = assert_equal(Given([[]]), tmp_path)
    assert (plan.images, len(plan.shards)) == (0, 0)
    assert_equal(Given([[Reject("a", "no-image")]]), tmp_path / "rejects")
    assert_equal(Given([]), tmp_path / "no parts")


def test_names_of_any_bytes_survive(tmp_path: Path) -> None:
    names = ["caf\udce9.jpg", "\u732b.jpg", "a\nb.jpg", "tab\t.jpg", "\udcff\udcfe.jpg"]
    images = [SourceImage(f"k{i}", name, 0, name) for i, name in enumerate(names)]
    assert_equal(Given([images, [Reject(names[0], "why", names[4])]]), tmp_path)


def test_a_label_that_is_none_reaches_the_driver_which_refuses_it(tmp_path: Path) -> None:
    source = Given([[image("a.jpg", None), image("b.jpg")]], ("a",))  # type: ignore[arg-type]
    assert assert_equal(source, tmp_path).images == 2


def test_keys_that_meet_are_renamed_alike(tmp_path: Path) -> None:
    """A new key may already be taken by another image's name or by another renamed image."""
    images = [image(name) for name in ("a/b_c.jpg", "a_b/c.jpg", "a/b_c.png", "a/b/c.jpg", "x.jpg")]
    taken = digest_key("a_b_c", "a/b_c.png")
    images += [SourceImage(taken, "z/unlucky.jpg", 0), SourceImage(taken, "y/unlucky.jpg", 0)]
    images += [image(f"{folder}/same.jpg")._replace(key="same") for folder in "abcdefgh"]
    for seed in range(5):
        random.Random(seed).shuffle(images)
        assert_equal(Given([images[:4], images[4:]]), tmp_path / str(seed))


def test_what_is_listed_twice_is_rejected_in_the_same_order(tmp_path: Path) -> None:
    entries = [
        *(image("a.jpg"), Reject("r1", "no-image", "x"), image("a.jpg", 1), image("b.jpg")),
        *(image("c/b.jpg")._replace(key="b"), image("b.jpg"), Reject("r2", "no-class")),
        *(image("c/b.jpg")._replace(key="b"), image("a.jpg"), image("d.jpg")),
    ]
    assert_equal(Given([entries[:3], entries[3:6], entries[6:]]), tmp_path)


def test_labels_that_are_text_are_numbered_alike(tmp_path: Path) -> None:
    entries: list[Any] = [
        LabeledText(image(f"{i}.jpg", -1), ("cat", "dog", "bad", "emu")[i % 4]) for i in range(40)
    ]
    entries[7:7] = [Reject("r1", "no-image"), entries[2], entries[1], entries[1]]
    entries += [LabeledText(image("z/1.png", -1)._replace(key="1"), "caf\udce9"), Reject("r2", "x")]
    assert_equal(Given([entries[:9], entries[9:20], entries[20:]]), tmp_path)


def test_tars_and_trees_are_planned_alike(tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "tars" / f"{number}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_tar([*samples(0, 5), (f"only-{number}.txt", b"x")]))
    source = open_source("webdataset", str(tmp_path / "tars"), "train", False)
    assert_equal(source, tmp_path / "a", shard_samples=4)
    for name in ("cat/1.jpg", "cat/1.png", "ant/2.jpg", "beside.txt"):
        write(tmp_path / "root" / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "ant" / "link").symlink_to(tmp_path / "elsewhere")
    tree = Folder(str(tmp_path / "root"), "train", False)
    assert_equal(tree, tmp_path / "b")
    found = in_buckets(tree, tmp_path / "c", seed=0, shard_samples=4)
    assert found.linked == [str(tmp_path / "root" / "ant" / "link")]


def test_readers_that_listing_finds_reach_the_driver(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.jpg\nmemory://photos/b.jpg\n.\n")
    source = open_source("files", str(tmp_path / "list.txt"), "train", False)

    class OtherProcess(LocalRunner):
        def shuffle(self, source: Source, *given: Any) -> set[str]:
            return super().shuffle(copy(source), *given)

    listing = plan_in_buckets(
        source, str(tmp_path / "plan"), OtherProcess(), seed=0, shard_samples=6, buckets=2
    )
    assert (listing.plan.images, len(listing.rejects)) == (2, 1)
    assert listing.readers == REMOTE_READERS


def test_a_worker_reads_its_shard_from_the_plan(tmp_path: Path) -> None:
    plan = assert_equal(Given([IMAGES]), tmp_path, buckets=7)
    assert plan.message(3) == ""
    assert plan.for_workers().images_of(3, "") == plan.shards[3]
    with pytest.raises(IndexError):
        _ = plan.shards[len(plan.shards)]
    plain = make_plan(IMAGES, seed=0, shard_samples=50)
    worker = plain.for_workers()
    assert worker.images_of(3, plain.message(3)) == plain.shards[3] == plan.shards[3]
    assert not worker.shards


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_the_digest_is_made_piece_by_piece(cut: int) -> None:
    plan = make_plan(IMAGES[:20], seed=0, shard_samples=7)
    order = [image for shard in plan.shards for image in shard]
    cuts = np.array(cut_shards(20, 7), np.int64)
    texts = (format_plan(order[first : first + cut], first, cuts) for first in range(0, 20, cut))
    assert compute_digest(texts, 3) == plan.digest
    assert compute_digest(iter([]), 0) == make_plan([], seed=0, shard_samples=7).digest


def test_both_ways_give_the_same_shards_byte_for_byte(tmp_path: Path) -> None:
    for number in range(23):
        write(tmp_path / "root" / "ab"[number % 2] / f"{number}.jpg", encode(noise(number)))
    write(tmp_path / "root" / "beside.txt")
    source = Folder(str(tmp_path / "root"), "train", False)
    images, rejects = list_images(source.images())
    plan: Plan = make_plan(images, seed=0, shard_samples=6)
    job = Job("x", "train", source, plan, rejects, SpectralOptions(), 0, str(tmp_path / "one"), 4)
    without_ray(job)
    found = in_buckets(source, tmp_path / "plan", seed=0, shard_samples=6)
    other = replace(job, plan=found.plan, rejects=found.rejects, out=str(tmp_path / "two"))
    without_ray(other)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def plan_without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `--plan cluster` plan in this process; return the list that the plans' folders go to."""
    places: list[str] = []

    def plan_in_this_process(source: Source, place: str, **options: Any) -> StoredListing:
        places.append(place)
        return plan_in_buckets(source, place, LocalRunner(), buckets=4, **options)

    monkeypatch.setattr("precompute.ray_cluster.connect_to_ray", nullcontext)
    monkeypatch.setattr("precompute.plan_job.plan_on_cluster", plan_in_this_process)
    return places


def plan_arguments(root: Path, out: Path) -> list[object]:
    for number in range(3):
        write(root / f"{number}.jpg", encode(noise(number)))
    common = ["--dataset", "folder", "--root", root, "--out", out, "--plan", "cluster"]
    return [*common, "--estimator", "spectral"]


def test_a_run_removes_its_own_plan_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = plan_arguments(tmp_path / "root", out)
    places = plan_without_ray(monkeypatch)
    build_folder(tmp_path / "root", out)
    (out / "dataset.json").unlink()
    thesis, other_plan = out / "plan" / "thesis.txt", out / ".saliency-plan" / "other" / "0.parquet"
    write(thesis)
    write(other_plan)  # of another run, in progress at the same time
    assert run_here(*arguments) == 0
    assert thesis.exists()
    assert other_plan.exists()
    assert [Path(place).parent for place in places] == [out / ".saliency-plan"]
    assert not Path(places[0]).exists()
    shutil.rmtree(out / ".saliency-plan")
    assert run_here(*arguments) == 0
    assert len(places) == 2
    assert not (out / ".saliency-plan").exists()


def test_a_dry_run_plans_outside_of_its_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = plan_arguments(tmp_path / "root", tmp_path / "out")
    places = plan_without_ray(monkeypatch)
    assert run_here(*arguments, "--dry-run") == 0
    assert "3 images -> 1 shard " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert len(places) == 1
    assert not Path(places[0]).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_the_command_plans_on_the_cluster_and_goes_on_in_the_driver(tmp_path: Path) -> None:
    """Either way of planning resumes a job begun in the other, with equal settings and bytes.

    A job without Ray, whose plan is made in memory, says what the bytes are.
    """
    for number in range(60):
        write(tmp_path / "root" / "abc"[number % 3] / f"{number}.jpg", encode(noise(number)))
    write(tmp_path / "root" / "a" / "0.png", encode(noise(1), "PNG"))  # its key is taken
    common = ["--dataset", "folder", "--root", tmp_path / "root", "--estimator", "spectral"]
    common += ["--shard-samples", "10", "--workers", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    source = Folder(str(tmp_path / "root"), "train", False)
    images, rejects = list_images(source.images())
    plan = make_plan(images, seed=0, shard_samples=10)
    job = Job("folder", "train", source, plan, rejects, SpectralOptions(), 0, str(one), 32)
    without_ray(job)
    assert run_here(*common, "--out", two, "--plan", "cluster") == 0
    assert contents(one) == contents(two)
    assert not (two / ".saliency-plan").exists()
    (two / "shards" / "000003.parquet").unlink()
    assert run_here(*common, "--out", two, "--plan", "driver") == 0
    assert contents(one) == contents(two)
    with pytest.raises(UserError, match="--extend compares"):
        run_here(*common, "--out", two, "--plan", "cluster", "--extend")
    loop = tmp_path / "root" / "a" / "loop"
    loop.symlink_to(tmp_path / "root" / "a")
    with pytest.raises(UserError, match=r"^[^\n]*leads back to a folder that holds it; remove it$"):
        run_here(*common, "--out", tmp_path / "three", "--plan", "cluster")
    assert not Store(tmp_path / "three").exists(".saliency-plan")
