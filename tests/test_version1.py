"""Test that files written by the code of commit e04945f are read, resumed and extended today.

tests/fixtures/version1/README.md says how they were made.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train.trainer
from pipeline.recipes import RECIPES, Recipe
from precompute.__main__ import Options, resolve
from precompute.estimators import SpectralOptions
from precompute.resume import find_missing_shards
from schemas import DatasetCard, FormatError, ShardDataset, UserError, tables
from schemas.settings import find_differences
from schemas.shard import read_marker
from schemas.storage import Store
from schemas.tables import SAMPLES_SCHEMA, from_parquet
from tests.train.ranks import add_tiny_encoders
from tests.train.runs import metrics
from train.__main__ import parse_command_line
from train.checkpoint import Checkpoints, read_state, write_state
from train.config import (
    RENAMED,
    TrainConfig,
    collect_default_settings,
    collect_settings,
    resolve_config,
    use_current_names,
)
from train.config_io import load_config
from train.methods import MoCoConfig, SimCLRConfig

FIXTURES = Path(__file__).parent / "fixtures" / "version1"
add_tiny_encoders()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / "dataset", tmp_path / "dataset"))


def change_parquet(path: Path, change) -> None:
    table = pq.read_table(path)
    buffer = io.BytesIO()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), buffer)
    path.write_bytes(buffer.getvalue())


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def job(out: Path, **changes):
    options = Options(
        **{
            **dict(dataset="demo", out=str(out), estimator=SpectralOptions(), limit=6),
            **dict(shard_samples=3, resize=28, batch_size=3),
            **changes,
        }
    )
    return resolve(options, contextlib.ExitStack())


def missing(job) -> list[int]:
    return find_missing_shards(Store(job.out), job.settings(None), job.default_settings)


def test_the_dataset_is_read_and_clean():
    dataset = ShardDataset.open(FIXTURES / "dataset")
    assert len(dataset) == len(list(dataset)) == 6
    assert dataset.verify().clean
    assert dataset.digest == "06c0ac53db628fe0461d040c0c5147cf9171f290a478dd9d2d56c3ca7e27b7cc"


def test_what_a_newer_version_adds_is_ignored(dataset: Path):
    """Add unknown columns to every table, and unknown fields to the card and the markers."""
    for name in ("samples", "shards", "rejects", "shards/000000", "shards/000001"):
        change_parquet(
            dataset / f"{name}.parquet",
            lambda t: t.add_column(0, "blur_score", pa.array([0.5] * len(t), pa.float32())),
        )
    change_json(dataset / "dataset.json", license="CC0", provenance={"crawl": 3})
    marker = dataset / "shards" / "000000.parquet"
    record = json.loads(pq.read_schema(marker).metadata[b"saliency_shards"])
    record |= {"written_by": "node 7", "shard": record["shard"] | {"seconds": 2.5}}
    record["rejects"] = [{"source": "a", "reason": "b", "detail": "c", "format": "HEIC"}]
    table = pq.read_table(marker)
    with_record = table.replace_schema_metadata({b"saliency_shards": json.dumps(record).encode()})
    pq.write_table(with_record, marker)

    found = ShardDataset.open(dataset)
    assert found.samples.schema.equals(SAMPLES_SCHEMA)
    assert found.verify().clean
    assert found.card == ShardDataset.open(FIXTURES / "dataset").card
    assert read_marker(found.store, 0).rejects[0].detail == "c"
    assert missing(job(dataset)) == []


def test_other_order_and_width_of_columns_change_nothing(dataset: Path):
    def widened(table: pa.Table) -> pa.Table:
        wide = {pa.int32(): pa.int64(), pa.string(): pa.large_string()}
        fields = [pa.field(f.name, wide.get(f.type, f.type)) for f in table.schema]
        table = table.cast(pa.schema(fields))
        return table.select(table.column_names[::-1])

    change_parquet(dataset / "samples.parquet", widened)
    change_parquet(dataset / "shards" / "000000.parquet", widened)
    assert ShardDataset.open(dataset).verify().clean


def test_optional_columns_and_fields_have_their_defaults_and_it_is_said(dataset: Path, caplog):
    tables.warn_of_default.cache_clear()
    optional = ["foreground", "source", "reencoded"]
    for name in ("samples", "shards/000000", "shards/000001"):
        change_parquet(dataset / f"{name}.parquet", lambda t: t.drop_columns(optional))
    gone = dict.fromkeys(("split", "estimator", "plan", "seed", "versions"), ...)
    change_json(dataset / "dataset.json", **gone)
    found = ShardDataset.open(dataset)
    row = found.samples.to_pylist()[0]
    assert (row["foreground"], row["source"], row["reencoded"]) == (None, "", False)
    assert (found.card.split, found.card.seed, found.card.estimator) == ("", 0, {})
    assert found.verify().clean
    assert len(list(found)) == 6
    assert "samples.parquet: has no foreground; None is used in its place" in caplog.text
    assert "dataset.json: has no seed; 0 is used in its place" in caplog.text
    assert caplog.text.count("samples.parquet: has no source") == 1


@pytest.mark.parametrize("column", ["key", "label", "height", "image_sha256", "saliency_min"])
def test_other_columns_are_needed(dataset: Path, column: str):
    change_parquet(dataset / "samples.parquet", lambda t: t.drop_columns([column]))
    with pytest.raises(FormatError, match=rf"samples\.parquet: its columns .* no {column} in"):
        _ = ShardDataset.open(dataset).samples


@pytest.mark.parametrize("name", ["name", "samples", "classes", "saliency_side"])
def test_other_fields_of_the_card_are_needed(dataset: Path, name: str):
    change_json(dataset / "dataset.json", **{name: ...})
    with pytest.raises(FormatError, match=rf"dataset\.json: .*'{name}'"):
        ShardDataset.open(dataset)


def test_columns_of_another_kind_are_refused():
    table = pa.table({**{f.name: pa.array(["x"]) for f in SAMPLES_SCHEMA}})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(FormatError, match=r"t\.parquet: its column shard is not int32"):
        from_parquet(buffer.getvalue(), SAMPLES_SCHEMA, "t.parquet")
    narrowing = pa.array([2**40])
    table = pq.read_table(FIXTURES / "dataset/samples.parquet").slice(0, 1)
    table = table.set_column(table.schema.get_field_index("label"), "label", narrowing)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with pytest.raises(FormatError, match="its column label is not int32"):
        from_parquet(buffer.getvalue(), SAMPLES_SCHEMA, "t.parquet")


@pytest.mark.parametrize("version", [2, 99, 0, None, "1", ...])
def test_other_format_versions_are_refused(dataset: Path, version):
    change_json(dataset / "dataset.json", format_version=version)
    upgrade = isinstance(version, int) and version > 1
    with pytest.raises(FormatError, match="upgrade to read it" if upgrade else "not a card of"):
        ShardDataset.open(dataset)


def test_the_card_keeps_its_bytes():
    content = (FIXTURES / "dataset" / "dataset.json").read_bytes()
    assert DatasetCard.from_json(content, "").to_json() == content


def test_precompute_resumes_and_extends_it(dataset: Path):
    assert missing(job(dataset)) == []
    (dataset / "shards" / "000001.parquet").unlink()
    assert missing(job(dataset)) == [1]
    shutil.copy(FIXTURES / "dataset/shards/000001.parquet", dataset / "shards")
    assert missing(job(dataset, limit=3, extend=True)) == [2]


def new_option(cls: type, name: str, default):
    """Return the same class in a version that has one more option."""
    field = (name, type(default), dataclasses.field(default=default, kw_only=True))
    newer = dataclasses.make_dataclass(cls.__name__, [field], bases=(cls,), frozen=True)
    newer.__doc__ = cls.__doc__
    return newer


def test_an_estimator_with_a_new_option_resumes_and_extends_it(dataset: Path):
    newer = new_option(SpectralOptions, "sharpen", 0.0)
    assert missing(job(dataset, estimator=newer())) == []
    assert missing(job(dataset, estimator=newer(), limit=3, extend=True)) == [2]
    with pytest.raises(UserError, match=r"settings: estimator\.sharpen was 0\.0, is 1\.5\. Give"):
        missing(job(dataset, estimator=newer(sharpen=1.5)))
    with pytest.raises(UserError, match=r"estimator\.sharpen was 0\.0, is 1\.5"):
        missing(job(dataset, estimator=newer(sharpen=1.5), limit=3, extend=True))
    with pytest.raises(
        UserError, match=r"resize was 28, is None; resize_quality|resize was 28, is"
    ):
        missing(job(dataset, resize=None))


def config(out: Path, **changes) -> TrainConfig:
    small = TrainConfig(
        data=str(FIXTURES / "dataset"),
        out=str(out),
        method=MoCoConfig(queue=8, projection=4, hidden=4),
        recipe=RECIPES["hp"],
        encoder="tiny",
        crop_size=14,
        batch_size=2,
        epochs=2,
        log_steps=1,
        device="cpu",
        precision="fp32",
    )
    return replace(small, **changes)


def kept(step: int) -> tuple[Path, dict]:
    folder = FIXTURES / "run" / "checkpoints" / f"step-{step:08d}"
    return folder, read_state(folder / "state.pt")


def checkpoints(given: TrainConfig) -> Checkpoints:
    """Make the checkpoints of a current run, as `train.trainer` does."""
    decided = resolve_config(given, torch.device("cpu"))
    settings = collect_settings(decided, ShardDataset.open(given.data).digest)
    return Checkpoints(
        folder=Path(given.out) / "checkpoints",
        keep=2,
        settings=settings | {"steps_per_epoch": 3},
        defaults=collect_default_settings(type(given.method), given, decided),
    )


@pytest.mark.parametrize("step", [1, 3])
def test_the_checkpoint_has_the_settings_of_today(tmp_path: Path, step: int):
    folder, state = kept(step)
    checkpoints(config(tmp_path)).count_steps(folder, state)


def test_options_that_were_renamed_compare_under_their_former_names(tmp_path: Path):
    """Use the former names in the kept checkpoints; another value of one is still refused."""
    folder, state = kept(3)
    former = RENAMED.keys() & state["settings"].keys()
    assert former == {"accumulate", "optim.trust", "optim.drop_epochs"}
    assert use_current_names(state["settings"]).keys().isdisjoint(former)
    now = checkpoints(config(tmp_path, grad_accum_steps=1))
    assert {RENAMED[name] for name in former} <= now.settings.keys()
    now.count_steps(folder, state)
    state["settings"]["optim.drop_epochs"] = [1]
    with pytest.raises(UserError, match=r"settings: optim\.milestones was \[1\], is \[60, 80\]\."):
        now.count_steps(folder, state)


def test_config_files_and_command_lines_with_former_names_are_read(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "accumulate: 2\noptim: {drop_epochs: [3, 4], trust: 0.1}\nknn: {neighbours: [5]}\n"
    )
    arguments = ["--data", "d", "--out", "o", "--accumulate", "2", "--drop-epochs", "3", "4"]
    arguments += ["--trust", "0.1", "--knn.neighbours", "5"]
    for given in (load_config(str(file)), parse_command_line(arguments)):
        assert given.grad_accum_steps == 2
        assert given.optim.milestones == (3, 4)
        assert given.optim.trust_coefficient == 0.1
        assert given.knn.neighbors == (5,)


def test_every_option_but_the_data_may_be_newer_than_a_checkpoint(tmp_path: Path):
    """Remove each option from the older version in turn: at its default nothing differs."""
    plain = config(tmp_path, method=MoCoConfig(), crop_size=None, recipe=Recipe(), batch_size=256)
    plain = replace(plain, epochs=200, encoder="resnet50", precision="auto")
    now = checkpoints(plain)
    for name in now.settings.keys() - {"data", "method", "steps_per_epoch"}:
        older = {key: value for key, value in now.settings.items() if key != name}
        assert find_differences(older, now.settings, now.defaults) == [], name
    assert now.settings["precision"] != "auto"


def test_an_option_that_was_set_differs_from_a_checkpoint_without_it(tmp_path: Path):
    folder, state = kept(3)
    del state["settings"]["recipe.region_choice"]
    del state["settings"]["optim.clip_gradient"]
    checkpoints(config(tmp_path)).count_steps(folder, state)
    salient = replace(RECIPES["hp"], region_choice="salient")
    with pytest.raises(UserError, match=r"recipe\.region_choice was random, is salient\."):
        checkpoints(config(tmp_path, recipe=salient)).count_steps(folder, state)
    with pytest.raises(UserError, match=r"settings: method was moco, is simclr\. Repeat"):
        checkpoints(config(tmp_path, method=SimCLRConfig())).count_steps(folder, state)
    state["settings"]["optim.lookahead"] = 5
    with pytest.raises(UserError, match=r"settings: optim\.lookahead was 5, is not set\. Repeat"):
        checkpoints(config(tmp_path)).count_steps(folder, state)


def test_a_training_goes_on_from_where_an_epoch_ended(tmp_path: Path):
    """Also test a checkpoint whose version did not know some of today's options."""
    folder = tmp_path / "checkpoints" / "step-00000003"
    shutil.copytree(FIXTURES / "run" / "checkpoints" / folder.name, folder)
    state = read_state(folder / "state.pt")
    for name in ("recipe.region_choice", "recipe.region_candidates", "stem", "optim.trust_clip"):
        del state["settings"][name]
    write_state(folder / "state.pt", state)
    train.trainer.train(config(tmp_path))
    assert [row["step"] for row in metrics(tmp_path)] == [4, 5, 6]
