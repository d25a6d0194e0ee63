"""Test that arms differ only in what they compare, and that finished runs are kept and compared."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from examples.study import report, runs
from examples.study.arms import FILLS, SCALES, SECOND_TIER, build_arms, describe_arm
from schemas import UserError
from tests.train.ranks import add_tiny_encoders
from tests.train.runs import write_images
from train.config import TrainConfig


def options(folder: Path, **changes) -> runs.Options:
    given = runs.Options(
        shards=folder / "shards", out=folder / "out", rows=folder / "rows", side_by_side=0
    )
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize("name", SCALES)
def test_arms_differ_in_method_and_recipe_alone(name, tmp_path: Path) -> None:
    scale = SCALES[name]
    arms = build_arms(scale)
    assert {arm for tier in scale.tiers.values() for arm in tier.arms} <= set(arms)
    given = options(tmp_path, scale=name, arms=tuple(arms), seeds=(1,))
    plain = arms["plain"]
    shared: set[str] = set()
    for run in runs.list_runs(given):
        own = dataclasses.replace(
            run.config, out="", method=plain.method, recipe=plain.recipe, optim=scale.config.optim
        )
        shared.add(repr(own))
    assert len(shared) == 1
    assert len({repr(arm) for arm in arms.values()}) == len(arms)


def test_a_warmup_is_the_only_change_of_its_arm() -> None:
    arms, optim = build_arms(SCALES["cpu"]), SCALES["cpu"].config.optim
    assert len(SECOND_TIER) == 8
    for name in SECOND_TIER:
        warm = arms[f"{name}-warmup"]
        assert warm.optim == dataclasses.replace(optim, warmup_epochs=2)
        assert dataclasses.replace(warm, optim=None) == arms[name]
        assert describe_arm(f"{name}-warmup") == f"{describe_arm(name)}, warm-up"


@pytest.mark.parametrize("fill", FILLS)
def test_hard_negatives_guidance_and_branches_change_one_thing(fill: str) -> None:
    arms = build_arms(SCALES["cpu"])

    def changed(one: str, other: str) -> set[str]:
        a, b = arms[one], arms[other]
        fields = {
            field.name
            for field in dataclasses.fields(a.recipe)
            if getattr(a.recipe, field.name) != getattr(b.recipe, field.name)
        }
        return fields | ({"method"} if a.method != b.method else set())

    assert changed(f"{fill}-guided", f"{fill}-hard") == {"hard_negatives"}
    assert changed(f"{fill}-guided", f"{fill}-random") == {"query_mask"}
    assert changed(f"{fill}-guided", f"{fill}-key") == {"branch"}
    assert changed(f"{fill}-hard", f"{fill}-hard-rho-1") == {"method"}
    assert changed("plain", "high-pass") == {"high_pass"}


def test_the_balanced_rho_is_that_of_the_queue() -> None:
    """Expect tau ln(4096 / 3) = 0.2 x 7.219 for the CPU's queue."""
    method = build_arms(SCALES["cpu"])["mean-hard-rho-balanced"].method
    assert method.rho == pytest.approx(1.4438, abs=1e-3)  # type: ignore[attr-defined]


def test_descriptions_are_unique() -> None:
    names = list(build_arms(SCALES["cpu"]))
    assert len({describe_arm(name) for name in names}) == len(names)


def test_what_is_missing_is_told_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown arm 'hpp'"):
        runs.run(options(tmp_path, arms=("hpp",)))
    with pytest.raises(UserError, match="no dataset here"):
        runs.run(options(tmp_path, arms=("plain",)))
    (tmp_path / "shards" / "x-train").mkdir(parents=True)
    with pytest.raises(UserError, match="x-test: no such dataset"):
        runs.run(options(tmp_path, arms=("plain",)))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Options:
    """Return a study of a few seconds: generated pictures, an encoder of one convolution."""
    add_tiny_encoders()
    for name in ("train", "val"):
        write_images(tmp_path / "shards" / name)
    for name in ("other-train", "other-test"):
        write_images(tmp_path / "shards" / name, seed=1)
    scale = SCALES["cpu"]
    config = dataclasses.replace(
        scale.config,
        encoder="tiny",
        batch_size=8,
        method=dataclasses.replace(scale.config.method, queue=16),  # type: ignore[type-var]
    )
    monkeypatch.setitem(SCALES, "cpu", dataclasses.replace(scale, config=config, probe_epochs=1))
    monkeypatch.setattr(runs, "NEIGHBORS", (1, 2))
    return options(tmp_path, arms=("plain", "mean-hard"), seeds=(0,), epochs=1, device="cpu")


@pytest.mark.slow
def test_finished_runs_are_rows_and_are_not_repeated(
    tiny: runs.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.run(tiny)
    rows = sorted(tiny.rows.rglob("*.json"))
    assert [path.stem for path in rows] == ["mean-hard-1-0", "plain-1-0"]
    row = json.loads(rows[0].read_text())
    assert set(row["accuracy"]) == {"knn 1", "knn 2", "linear test", "linear other"}
    text = report.format_table(tiny)
    assert "2 of 2 runs are finished" in text
    assert "| saliency-guided masks, mean, hard negatives |" in text
    report.draw_plot(tiny, tiny.rows / "plot.png")
    assert (tiny.rows / "plot.png").stat().st_size > 1000

    def refuse(config: TrainConfig) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "train", refuse)
    runs.run(tiny)
    row["settings"]["optim.lr"] = 0.5
    rows[0].write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"mean-hard-1-0.json: .*optim.lr was 0.5, is 0.06"):
        runs.run(tiny)


def test_runs_side_by_side_have_a_core_each_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(tmp_path, arms=("plain", "supervised", "high-pass"), side_by_side=2)
    chosen = runs.list_runs(given)

    def command(given: runs.Options, run: runs.Run, core: int) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"print('core {core}'); raise SystemExit({run.arm == 'plain'})",
        ]

    monkeypatch.setattr(runs, "build_child_command", command)
    logs = list(runs.run_side_by_side(given, chosen))
    assert [log and log.name for log in logs] == ["plain-24-0.log", None, None]
    assert "plain-24-0 FAILED (1)" in capsys.readouterr().out
    assert logs[0] is not None
    assert logs[0].read_text().startswith("core ")


def test_a_child_is_told_what_to_do(tmp_path: Path) -> None:
    """Parse the command of a child with its own parser: it is exactly the one run."""
    from schemas.cli import parse

    given = options(tmp_path, arms=("plain", "supervised"), side_by_side=2, device="cpu")
    run = runs.list_runs(given)[1]
    command = runs.build_child_command(given, run, 0)
    child = parse(runs.Options, command[3:])
    assert child.side_by_side == 0
    assert runs.list_runs(child) == [run]
