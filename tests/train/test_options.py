"""Options of a run: from the command line, from a file, and refused ones."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.trainer
from pipeline import RECIPES, Cache
from schemas import UserError
from tests.train.runs import ARGUMENTS, command, config
from train.__main__ import main, parse_command_line
from train.config import KnnConfig, make_cache, resolve_config
from train.config_io import dump_config, load_config
from train.evaluate.export import ExportOptions, export
from train.evaluate.knn import KnnOptions
from train.evaluate.knn import evaluate as evaluate_knn
from train.evaluate.linear import LinearOptions
from train.evaluate.linear import evaluate as evaluate_linear
from train.presets import PRESETS, SIMCLR_VIEWS
from train.report import ReportOptions, write_report
from train.run_info import collect_notes


def test_the_config_of_a_run_is_read_back_unchanged(shards, run, tmp_path, monkeypatch):
    """It resumes the same run; options on the command line override it."""
    argv = ["--config", str(run / "config.yaml")]
    again = parse_command_line(argv)
    assert replace(again, knn=KnnConfig()) == config(shards, run)
    changed = parse_command_line([*argv, "--rho", "3", "--recipe", "blur", "--seed", "5"])
    assert (changed.method.rho, changed.recipe.fill, changed.seed) == (3.0, "blur", 5)
    assert changed.batch_size == 8
    for more, lr, crop in (
        (["--base-lr", "0.3"], 0.3 * 8 / 256, 28),
        (["--batch-size", "16"], 0.03 * 16 / 256, 28),
        (["--crop-size", "56"], 0.03 * 8 / 256, 56),
    ):
        decided = resolve_config(parse_command_line([*argv, *more]), torch.device("cpu"))
        assert decided.optim.lr == pytest.approx(lr)
        assert decided.recipe.crop_size == crop


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochz: 3", "unknown option 'epochz': did you mean epochs"),
        ("method: {name: mocco}", "unknown method 'mocco': did you mean moco"),
        ("method: {name: moco, tau: 1}", "method: unknown option 'tau'"),
        ("recipe: {name: blurr}", "unknown recipe 'blurr': did you mean blur"),
        ("epochs: many", "epochs: Input should be a valid integer"),
        ("recipe: {crop_size: 30}", "a multiple of the grid"),
        ("[1, 2]", "contains no options"),
        ("method: mocco", "unknown method 'mocco': did you mean moco"),
        ("method: [moco]", r"method: is \['moco'\], not options of the form"),
        ("recipe: 5", "recipe: is 5, not options of the form"),
        ("optim: [sgd]", "not options of the form"),
        ("method: {name: 5}", "method: name: is 5, not a name"),
        ("recipe: {name: [hp]}", r"recipe: name: is \['hp'\], not a name"),
        ("a: [", "cannot be read as YAML"),
        ("wandb: 2026-13-45", r"cannot be read as YAML \(month must be in 1\.\.12"),
    ],
)
def test_unsuitable_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        parse_command_line(["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "absent.yaml"
    with pytest.raises(UserError, match=r"absent.yaml: cannot be read: No such file"):
        parse_command_line(["--config", str(path)])


def test_a_file_may_give_a_method_and_a_recipe_by_their_names_alone(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: x\nout: y\nmethod: simclr\nrecipe: blur\n")
    by_command = ["--data", "x", "--out", "y", "--method", "simclr", "--recipe", "blur"]
    assert parse_command_line(["--config", str(path)]) == parse_command_line(by_command)


def test_a_file_names_a_recipe_and_changes_it(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: x\nout: y\nrecipe: {name: blur, hard_negatives: 0}")
    recipe = parse_command_line(["--config", str(path)]).recipe
    assert recipe == replace(RECIPES["blur"], hard_negatives=0)


@pytest.mark.parametrize("method", ["supervised", "simclr", "adios", "maskco", "moco"])
def test_a_file_that_names_a_method_starts_from_its_preset(tmp_path, method):
    path = tmp_path / "c.yaml"
    path.write_text(f"data: x\nout: y\nmethod: {{name: {method}}}\nseed: 3\n")
    by_command = parse_command_line(
        ["--data", "x", "--out", "y", "--method", method, "--seed", "3"]
    )
    assert parse_command_line(["--config", str(path)]) == by_command
    if method == "simclr":
        path.write_text(
            "data: x\nout: y\nmethod: {name: simclr, temperature: 0.5}\nrecipe: {name: blur}\n"
        )
        own = parse_command_line(["--config", str(path)])
        assert (own.method.temperature, own.method.head_layers) == (0.5, 3)
        blur = ["--data", "x", "--out", "y", "--method", "simclr", "--recipe", "blur"]
        assert own.recipe == parse_command_line(blur).recipe


def test_a_recipe_beside_a_file_keeps_the_views_of_the_file(tmp_path):
    given = replace(PRESETS["simclr"].config, data="x", out="y")
    given = replace(given, recipe=replace(given.recipe, **SIMCLR_VIEWS))
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(given, given))
    assert load_config(str(path)) == given
    recipe = parse_command_line(["--config", str(path), "--recipe", "blur"]).recipe
    assert recipe == replace(RECIPES["blur"], **SIMCLR_VIEWS)


def test_unsuitable_knn_data_is_refused_at_once(shards, tmp_path):
    for knn, message in (
        (KnnConfig(data=shards), "20 200: each must be between 1 and 25"),
        (KnnConfig(data="/nowhere"), "no dataset here"),
    ):
        with pytest.raises(UserError, match=message):
            train.trainer.train(config(shards, tmp_path, knn=knn))


def test_evaluations_and_reports_write_no_urls(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run, url = str(tmp_path), "s3://b/x"
    for refused in (
        lambda: evaluate_linear(LinearOptions(encoder=run, data="d", test_data="d", out=url)),
        lambda: evaluate_linear(LinearOptions(encoder=url, data="d", test_data="d")),
        lambda: evaluate_knn(KnnOptions(encoder=url, data="d")),
        lambda: export(ExportOptions(encoder=run, out=url)),
        lambda: write_report(ReportOptions(run=run, out=url)),
    ):
        with pytest.raises(UserError, match=f"{url}: must be a path of this machine"):
            refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--recipe", "hpp", "did you mean hp"),
        ("--method", "mocco", "did you mean moco"),
        ("--encoder", "resnet81", "did you mean resnet18"),
        ("--data", "/nowhere/at/all", "no dataset here"),
        ("--out", "/proc/run", "/proc/run"),
        ("--out", "/proc/\udcff", "TensorBoard needs a name in UTF-8; choose another --out"),
        ("--out", "s3://b/run", "--out s3://b/run: must be a path of this machine; only datasets"),
        ("--cache", "s3://b/c", "--cache s3://b/c: must be a path of this machine"),
        ("--crop-size", "30", "a multiple of the grid"),
        ("--batch-size", "1", "one image at a time"),
        ("--batch-size", "0", "at least 1"),
        ("--batch-size", "64", "26 samples are too few"),
        ("--queue", "7", "smaller than the batch"),
        ("--device", "cuda", "no GPU"),
        ("--warmup-epochs", "2", "must be below --epochs 2"),
        ("--preset", "mocco", "did you mean moco"),
        ("--preset", "simclr", "--preset is of method simclr, --method is moco"),
        ("--lr", "-1", "--lr -1.0: must be above 0"),
        ("--base-lr", "0", "--base-lr 0.0: must be above 0"),
        ("--clip-gradient", "0", "--clip-gradient 0.0: must be above 0"),
        ("--momentum", "1", "--momentum 1.0: must be at least 0 and below 1"),
        ("--weight-decay", "-1", "must be at least 0"),
        ("--temperature", "0", "--temperature 0.0: must be above 0"),
        ("--temperature", "nan", "--temperature nan: must be above 0"),
        ("--ema-momentum", "1.5", "--ema-momentum 1.5: must be between 0 and 1"),
        ("--rho", "-2", "must be at least 0"),
        ("--projection", "0", "--projection 0: must be at least 1"),
        ("--hidden", "0", "--hidden 0: must be at least 1"),
        ("--crop-size", "0", "crop_size is 0"),
        ("--knn.neighbors", "0", "--knn.neighbors 0: must be at least 1"),
        ("--cache-gb", "0", "--cache-gb 0.0: must be above 0"),
        ("--cache-gb", "inf", "--cache-gb inf: must be above 0 and finite"),
        ("--weight-decay", "inf", "--weight-decay inf: must be at least 0 and finite"),
        ("--seed", str(2**64), f"--seed {2**64}: must be at least 0 and below 2\\^64"),
        ("--accumulate", "3", "does not divide among 1 processes x 3 micro-batches; the nearest"),
    ],
)
def test_user_mistakes_are_user_errors(shards, tmp_path, monkeypatch, option, value, message):
    if option == "--batch-size" and value == "64":
        monkeypatch.setitem(ARGUMENTS, "--queue", "64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = command(shards, tmp_path / "run", **{"--method": "moco", option: value})
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(UserError, match=message):
        main()


@pytest.mark.parametrize(
    ("ranks", "changes", "is_accepted"),
    [
        (4, {"batch_size": 4}, False),
        (4, {"batch_size": 4, "sync_bn": True}, True),
        (2, {"batch_size": 4, "grad_accum_steps": 2, "sync_bn": True}, True),
        (1, {"batch_size": 1, "sync_bn": True}, False),
        (1, {"batch_size": 2, "grad_accum_steps": 2, "sync_bn": True}, False),
    ],
)
def test_one_image_per_process_needs_synchronized_norms(monkeypatch, ranks, changes, is_accepted):
    monkeypatch.setattr("train.config.world_size", lambda: ranks)
    refused = pytest.raises(UserError, match="one image at a time")
    with nullcontext() if is_accepted else refused:
        resolve_config(config("data", "out", **changes), torch.device("cpu"))


def indivisible():
    from train.config import resolve_config

    try:
        resolve_config(config("data", "out", batch_size=9), torch.device("cpu"))
    except UserError as error:
        return str(error)
    return "accepted"


def test_batch_that_does_not_divide_among_ranks_is_refused(two_ranks):
    assert set(two_ranks(indivisible)) == {
        "--batch-size 9: does not divide among 2 processes; the nearest that does is 8"
    }


def compare_options(out, *changes):
    """Return the outcome of a rank that starts with its own options."""
    from train.config import refuse_different_options
    from train.distributed import raise_on_all_ranks, rank

    device = torch.device(changes[rank()].get("device", "cpu"))
    own = config("data", out / str(rank()), **changes[rank()])
    try:
        with raise_on_all_ranks():
            refuse_different_options(own, "digest", device)
    except (UserError, SystemExit) as error:
        return str(error)
    return "accepted"


def test_ranks_with_other_options_than_rank_0_are_refused(two_ranks, tmp_path):
    equal = (
        {"cache": "a", "wandb": "project"},
        {"cache": "b", "decode_on": "cpu", "keep_checkpoints": 3},
    )
    assert two_ranks(compare_options, tmp_path, *equal) == ["accepted", "accepted"]
    knn = KnnConfig(data="photos")
    for change, difference in (
        ({"seed": 5}, "seed is 5, there 0"),
        ({"log_steps": 1}, "log_steps is 1, there 2"),
        ({"device": "cuda"}, "device is cuda, there cpu"),
        ({"knn": knn}, "knn.data is photos, there None"),
    ):
        message, status = two_ranks(compare_options, tmp_path, {}, change)
        assert message == (
            f"rank 1: started with other options or data than rank 0: {difference}. Give every "
            "machine the same command, data and kind of device"
        )
        assert status == "2"


def train_in_own_folder(data, out):
    from train import checkpoint
    from train.distributed import rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SECONDS_UNTIL_VISIBLE", 0.1)
        try:
            train.trainer.train(config(data, out / str(rank())))
        except (UserError, SystemExit) as error:
            return str(error)
    return "trained"


def test_a_folder_that_not_all_machines_see_is_refused_at_once(two_ranks, shards, tmp_path):
    message, status = two_ranks(train_in_own_folder, shards, tmp_path)
    assert message.startswith(f"rank 1: {tmp_path}/1/.lock: rank 0 sees it, but ")
    assert "mount the folder of --out on every machine" in message
    assert status == "2"
    assert [path.name for path in (tmp_path / "0").iterdir()] == [".lock"]


@pytest.mark.slow
def test_command_line_shows_one_line_and_no_traceback(tmp_path):
    arguments = command("/nowhere", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: /nowhere: no dataset here")
    assert done.stderr.count("\n") == 1


def test_a_store_needs_no_option_of_the_cache(tmp_path):
    assert collect_notes(config("s3://bucket/data", tmp_path), torch.device("cpu")) == []
    assert make_cache(None, None) == Cache()
    assert make_cache("folder", 1.5) == Cache(Path("folder"), 1_500_000_000)


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (
            ["--milestones", "1", "2"],
            "--milestones is not at its default, but has no effect with --schedule cosine",
        ),
        (
            ["--trust-coefficient", "0.1"],
            "--trust-coefficient is not at its default, but has no effect with --optimizer sgd",
        ),
        (
            ["--optimizer", "lars", "--no-decay-norms"],
            "--decay-norms is not at its default, but has no effect with",
        ),
        (["--schedule", "steps", "--milestones", "1", "--epochs", "2"], None),
        (["--optimizer", "lars", "--trust-coefficient", "0.1"], None),
    ],
)
def test_an_option_without_effect_is_noted(tmp_path, arguments, note):
    settings = parse_command_line(["--data", "data", "--out", str(tmp_path), *arguments])
    notes = collect_notes(settings, torch.device("cpu"))
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
