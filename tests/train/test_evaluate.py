"""Evaluations against independent references: accuracies by hand, torchvision, a list."""

import json
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.models import resnet18

from pipeline import EvalViews
from schemas import ShardDataset, UserError, write_dataset
from schemas.cli import run as run_command
from tests.train.runs import scores, write_images
from train.encoders import build_encoder, load_encoder, save_encoder
from train.evaluate import export, linear, results, tables
from train.evaluate.__main__ import main
from train.evaluate.detection.command import DetectionOptions
from train.evaluate.knn import KnnOptions, evaluate, format_table
from train.features import build_eval_recipe


def test_evaluation_appends_rows_and_prints_them(shards, run):
    (run / "results.jsonl").unlink(missing_ok=True)
    options = KnnOptions(
        encoder=str(run), data=shards, baseline=True, neighbors=(1, 5), device="cpu"
    )
    rows = evaluate(options)
    assert [row["weights"] for row in rows] == ["trained", "untrained"]
    assert all(0 <= row["accuracy"]["5"] <= 1 and row["high_pass"] for row in rows)
    evaluate(replace(options, baseline=False, test_data=shards, neighbors=(1,)))
    written = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert written[:2] == rows
    assert written[2]["split"] == "test data"
    assert written[2]["accuracy"] == {"1": 1.0}  # each image is its own neighbor
    assert "leave-one-out" in format_table(rows)


def test_a_dataset_without_a_name_is_told_by_its_folder(shards, run, tmp_path):
    dataset = ShardDataset.open(shards)
    for folder in ("cats", "dogs"):
        write_dataset(str(tmp_path / folder), dataset, name="folder", classes=dataset.classes)
    options = KnnOptions(
        encoder=str(run), data=str(tmp_path / "cats"), neighbors=(1,), device="cpu"
    )
    rows = [*evaluate(options), *evaluate(replace(options, data=str(tmp_path / "dogs")))]
    assert [row["data"] for row in rows] == ["cats", "dogs"]


def test_evaluation_refuses_what_it_cannot_do(shards, run, tmp_path):
    options = KnnOptions(encoder=str(run), data=shards, device="cpu")
    with pytest.raises(UserError, match="neighbors 20 200: each must be between 1 and 25"):
        evaluate(options)
    with pytest.raises(UserError, match="no such encoder"):
        evaluate(replace(options, encoder=str(tmp_path)))
    unlabeled = write_images(tmp_path / "unlabeled", label=-1)
    with pytest.raises(UserError, match="26 of 26 images have no label"):
        evaluate(replace(options, data=unlabeled))
    alike = write_images(tmp_path / "alike", label=1)
    with pytest.raises(UserError, match="all images have the same class"):
        evaluate(replace(options, data=alike))


def probe_options(shards, run, **changes) -> linear.LinearOptions:
    options = linear.LinearOptions(
        encoder=str(run), data=shards, test_data=shards, batch_size=8, epochs=2, device="cpu"
    )
    return replace(options, **changes)


@pytest.mark.slow
def test_linear_probe_trains_the_classifier_alone(shards, run, tmp_path):
    before = (run / "encoder.safetensors").read_bytes()
    row = linear.evaluate(probe_options(shards, run, out=str(tmp_path)))
    assert (run / "encoder.safetensors").read_bytes() == before
    assert json.loads((run / "results.jsonl").read_text().splitlines()[-1]) == row
    encoder, metadata, _ = load_encoder(str(run))
    step = max((tmp_path / "checkpoints").iterdir())
    state = torch.load(step / "state.pt", weights_only=True)["model"]
    for name, value in encoder.state_dict().items():  # the batch statistics too
        assert torch.equal(state[f"encoder.{name}"], value), name

    # compute the accuracies again from the files
    classifier = load_file(tmp_path / "classifier.safetensors")
    assert classifier["weight"].shape == (2, 512)
    encoder.eval()
    hits = 0
    for batch in EvalViews(shards, 5, "cpu", crop_size=28, recipe=build_eval_recipe(metadata)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = encoder(batch.image).float()
        logits = features @ classifier["weight"].T + classifier["bias"]
        hits += int((logits.argmax(1) == batch.label).sum())
    assert row["accuracy"]["top1"] == pytest.approx(hits / 26, abs=0.5 / 26)
    assert row["accuracy"]["top5"] == 1.0  # two classes
    found = [row["top1"] for row in scores(tmp_path)]
    assert len(found) == 2
    assert row["accuracy"]["best_top1"] == pytest.approx(max(found), abs=1e-6)


@pytest.mark.slow
def test_linear_probe_resumes_only_with_the_same_encoder(shards, run, tmp_path):
    options = probe_options(shards, run, out=str(tmp_path / "probe"), epochs=1)
    first = linear.evaluate(options)
    again = linear.evaluate(options)  # nothing is left to do
    assert again["accuracy"] == first["accuracy"]
    other, metadata = build_encoder("resnet18")[0], load_encoder(str(run))[1]
    save_encoder(tmp_path / "encoder.safetensors", other, metadata)
    with pytest.raises(UserError, match=r"method\.sha256 was"):
        linear.evaluate(replace(options, encoder=str(tmp_path)))


@pytest.mark.slow
def test_a_probe_does_not_report_the_accuracy_of_other_test_images(shards, run, tmp_path):
    options = probe_options(shards, run, out=str(tmp_path / "probe"), epochs=1)
    linear.evaluate(options)
    other = write_images(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"method\.test_digest was"):
        linear.evaluate(replace(options, test_data=other))


@pytest.mark.slow
def test_a_probe_of_an_older_version_resumes(shards, run, tmp_path):
    """Its checkpoints do not say which images it was tested on."""
    options = probe_options(shards, run, out=str(tmp_path / "probe"), epochs=1)
    first = linear.evaluate(options)
    for path in (tmp_path / "probe" / "checkpoints").glob("*/state.pt"):
        state = torch.load(path, weights_only=True)
        del state["settings"]["method.test_digest"]
        torch.save(state, path)
    assert linear.evaluate(options)["accuracy"] == first["accuracy"]


def test_probe_of_a_high_pass_encoder_sees_high_pass_images(shards, run):
    """Train and test images are filtered; those of other encoders are not (D15)."""
    _, metadata, _ = load_encoder(str(run))
    assert build_eval_recipe(metadata).high_pass
    plain = build_eval_recipe({**metadata, "high_pass": "False"})
    assert not plain.high_pass
    filtered = next(
        iter(EvalViews(shards, 26, "cpu", crop_size=28, recipe=build_eval_recipe(metadata)))
    )
    unfiltered = next(iter(EvalViews(shards, 26, "cpu", crop_size=28, recipe=plain)))
    assert filtered.image.mean(dim=(1, 2, 3)).abs().max() < 0.1
    assert unfiltered.image.mean(dim=(1, 2, 3)).abs().max() > 0.1


def test_export_loads_into_torchvision(run, tmp_path):
    options = export.ExportOptions(encoder=str(run), out=str(tmp_path / "weights.pth"))
    state = torch.load(export.export(options), weights_only=True)
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert torch.equal(model.conv1.weight, load_encoder(str(run))[0].conv1.weight)
    options = replace(options, format="safetensors", out=str(tmp_path / "again.safetensors"))
    assert set(load_file(export.export(options))) == set(state)


def test_detectron2_names_by_a_list_of_them():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn3.bias": "res2.0.conv3.norm.bias",
        "layer2.0.downsample.0.weight": "res3.0.shortcut.weight",
        "layer4.2.bn2.running_mean": "res5.2.conv2.norm.running_mean",
        "layer3.0.downsample.1.weight": "res4.0.shortcut.norm.weight",
    }
    assert {name: export.to_detectron2_name(name) for name in names} == names


def test_detectron2_pickle_has_every_weight_bit_for_bit(run, tmp_path):
    options = export.ExportOptions(
        encoder=str(run), format="detectron2", out=str(tmp_path / "detectron2.pkl")
    )
    with export.export(options).open("rb") as file:
        content = pickle.load(file)
    assert content["matching_heuristics"] is True
    weights = load_encoder(str(run))[0].state_dict()
    assert len(content["model"]) == len(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(
            content["model"][export.to_detectron2_name(name)], value.numpy()
        )


@pytest.mark.parametrize("form", ["torchvision", "detectron2"])
def test_export_refuses_a_stem_that_the_format_does_not_have(tmp_path, form):
    encoder, _ = build_encoder("resnet18", "small")
    save_encoder(
        tmp_path / "encoder.safetensors", encoder, {"encoder": "resnet18", "stem": "small"}
    )
    with pytest.raises(UserError, match=f"small stem, which {form}'s ResNets .* safetensors"):
        export.export(export.ExportOptions(encoder=str(tmp_path), format=form))
    assert not (tmp_path / "torchvision.pth").exists()


def test_an_export_never_replaces_the_encoder(tmp_path):
    """Foreign weights may have the name of an export, and hold more than an export does."""
    path = tmp_path / "torchvision.pth"
    torch.save(resnet18().state_dict(), path)
    content = path.read_bytes()
    for out in (None, str(tmp_path / "." / "torchvision.pth")):
        options = export.ExportOptions(encoder=str(path), out=out)
        with pytest.raises(UserError, match=r"torchvision\.pth: is the encoder itself; write to"):
            export.export(options)
    assert path.read_bytes() == content


def test_an_export_that_cannot_be_written_is_named_and_leaves_the_earlier_file(run, tmp_path):
    (tmp_path / "file").touch()
    options = export.ExportOptions(encoder=str(run), out=str(tmp_path / "file" / "e.pth"))
    with pytest.raises(UserError, match=r"e.pth: a file is in the way of a folder"):
        export.export(options)


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_a_folder_that_takes_no_results_is_refused_before_the_work(
    shards, run, monkeypatch, protocol
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("train.features.EvalViews", None)  # not reached
    monkeypatch.setattr("train.trainer.MaskedViews", None)
    options = KnnOptions(encoder=str(run), data=shards, neighbors=(1,), device="cpu")
    with pytest.raises(UserError, match=r"results.jsonl: no permission to write the result"):
        evaluate(options) if protocol == "knn" else linear.evaluate(probe_options(shards, run))


def written(
    folder, method, recipe, accuracy, *, data="IN-100", seed=0, branch="query", hard=1,
    epochs=100, probe=100,
):  # fmt: skip
    settings = {"recipe.fill": recipe, "recipe.branch": branch, "recipe.hard_negatives": hard}
    settings |= {"seed": seed, "epochs": epochs}
    row = {
        "protocol": "linear",
        "accuracy": {"top1": accuracy},
        "data": data,
        "data_digest": data,
        "test_digest": data,
        "method": method,
        "recipe": recipe,
        "encoder": "resnet18",
        "epochs": probe,
        "pretraining": {"seed": str(seed), "settings": json.dumps(settings)},
    }
    out = folder / f"{method}-{recipe.replace(':', '-')}-{branch}-{seed}"
    out.mkdir(exist_ok=True)
    results.append(out, [row])


def test_table_has_the_papers_layout(tmp_path, monkeypatch, capsys):
    written(tmp_path, "moco", "mean", 0.10)  # of a repeated evaluation the last counts
    written(tmp_path, "moco", "mean", 0.50)
    written(tmp_path, "moco", "mean", 0.70, seed=1)
    written(tmp_path, "moco", "mean", 0.9, data="Flowers-102")
    written(tmp_path, "moco", "none", 0.25, hard=0)
    written(tmp_path, "moco", "mean", 0.4, branch="key")
    monkeypatch.setattr(sys, "argv", ["evaluate", "table", str(tmp_path)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| linear, top-1 % | IN-100 | Flowers-102 | runs |"
    assert "| moco, mean, query masked, 1 hard | 60.00 ± 14.14 | 90.00 | 2 |" in lines
    assert "| moco, none | 25.00 |  | 1 |" in lines
    assert "| IN-100, linear, top-1 % | key | both | query |" in lines
    assert "| moco, mean, 1 hard | 40.00 |  | 60.00 ± 14.14 |" in lines
    assert "| moco, none | 25.00 |  |  |" in lines


def test_tables_average_only_over_seeds(tmp_path, capsys, monkeypatch):
    """Other methods and settings have separate lines, which name the difference."""
    for method, accuracies in (("moco", (0.1, 0.2)), ("simclr", (0.7,))):
        for seed, score in enumerate(accuracies):
            written(tmp_path, method, "none", score, hard=0, seed=seed)
            written(tmp_path, method, "mean", score, hard=0, seed=seed)
    written(tmp_path, "moco", "mean", 0.3, hard=0, branch="both")
    written(tmp_path, "moco", "none", 0.4, hard=0, seed=2, epochs=200)
    written(tmp_path, "moco", "none", 0.5, hard=0, seed=0, probe=1)
    monkeypatch.setattr(sys, "argv", ["evaluate", "table", str(tmp_path)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| linear, top-1 % | IN-100, epochs 100 | IN-100, epochs 1 | runs |"
    assert "| moco, none, epochs 100 | 15.00 ± 7.07 | 50.00 | 2 |" in lines
    assert "| moco, none, epochs 200 | 40.00 |  | 1 |" in lines
    assert "| simclr, none | 70.00 |  | 1 |" in lines
    branches = lines[lines.index("| IN-100, epochs 100, linear, top-1 % | key | both | query |") :]
    assert "| moco, mean, 0 hard | | 30.00 | 15.00 ± 7.07 |".replace("| |", "|  |") in branches
    # the probe of 1 epoch is not averaged with those of 100, and has no second branch
    assert "| moco, none, epochs 100 | 15.00 ± 7.07 |  |  |" in branches
    assert not any("simclr" in line or "epochs 1," in line for line in branches)


def test_settings_that_begin_alike_have_lines_of_their_own(tmp_path):
    written(tmp_path, "moco", "my_fills.py:one", 0.2, seed=0)
    written(tmp_path, "moco", "my_fills.py:two", 0.8, seed=1)
    rows = [row | {"recipe": "custom"} for row in results.collect([str(tmp_path)])]
    lines = tables.format_table(rows, "linear").splitlines()
    name = "moco, custom, query masked, 1 hard, recipe.fill my_fills.py"
    assert f"| {name}:one | 20.00 | 1 |" in lines
    assert f"| {name}:two | 80.00 | 1 |" in lines
    assert tables.format_value("0123456789abcdef" * 4) == "0123456789ab"


def test_an_untrained_encoder_has_no_branch(tmp_path):
    for branch in ("query", "key"):
        written(tmp_path, "moco", "mean", 0.2, branch=branch)
    rows = results.collect([str(tmp_path)])
    kernel = {"high_pass_kernel": "11", "high_pass_sigma": "5.0"}
    untrained = [
        row
        | {"weights": "untrained", "high_pass": False, "crop_size": 56, "seed": 0}
        | {"pretraining": row["pretraining"] | kernel}
        for row in rows
    ]
    tables_with, tables_without = (
        list(tables.format_branch_tables(own, "linear")) for own in (rows + untrained, rows)
    )
    assert [table.splitlines()[2:] for table in tables_with] == [
        ["| moco, mean, 1 hard | 20.00 |  | 20.00 |"]
    ]
    assert tables_with == tables_without


def test_an_untrained_encoder_counts_once_for_each_seed_and_kind_of_images():
    """It was evaluated beside three runs, on the images of each: twice high-pass ones."""

    def build(high_pass, accuracy, seed=0, run_seed=0):
        pretraining = {"seed": str(run_seed), "high_pass_kernel": "11", "high_pass_sigma": "5.0"}
        return {
            "protocol": "knn", "accuracy": {"20": accuracy}, "data": "d", "encoder": "resnet18",
            "method": "moco", "recipe": "hp", "high_pass": high_pass, "crop_size": 56,
            "weights": "untrained", "seed": seed, "pretraining": pretraining,
        }  # fmt: skip

    rows = [build(True, 0.4), build(True, 0.4, run_seed=1), build(False, 0.2)]
    lines = tables.format_table(rows, "knn").splitlines()
    assert "| untrained resnet18, high_pass 11 5.0 | 40.00 | 1 |" in lines
    assert "| untrained resnet18, high_pass False | 20.00 | 1 |" in lines
    rows = [build(False, 0.2), build(False, 0.3, seed=1)]
    assert tables.format_table(rows, "knn").endswith("| untrained resnet18 | 25.00 ± 7.07 | 2 |")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"cache_gb": 0.0}, r"--cache-gb 0\.0: must be above 0"),
    ],
)
def test_options_of_knn_outside_their_range_are_refused(shards, run, changes, message):
    options = KnnOptions(encoder=str(run), data=shards, device="cpu", neighbors=(1,), **changes)
    with pytest.raises(UserError, match=message):
        evaluate(options)


def test_commands_report_mistakes_in_one_line(tmp_path, monkeypatch):
    for arguments, message in (
        (["linaer"], "did you mean linear"),
        (["table", str(tmp_path)], "evaluate an encoder first"),
        (["export", "--encoder", str(tmp_path)], "no such encoder"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
        with pytest.raises(UserError, match=message):
            main()


@pytest.mark.parametrize(
    "options", [["knn", "--encodr", "run"], ["linear", "--help"], ["knn", "--encoder", "a"]]
)
def test_one_rank_of_a_machine_reports_what_is_wrong_there(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", *options])
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        run_command(main)
    assert any(capsys.readouterr())


@pytest.mark.parametrize("options_class", [KnnOptions, linear.LinearOptions, DetectionOptions])
def test_evaluations_have_the_option_that_a_message_names(options_class):
    assert options_class(rank_timeout=5).rank_timeout == 5
