"""Test what a wrong command line prints: one line with every mistake and the nearest option."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from schemas import UserError
from schemas.cli import parse, run


@dataclass(frozen=True)
class Recipe:
    """A recipe."""

    fill: str = "none"
    """Fill of masked cells."""
    ratio: tuple[float, float] = (0.1, 0.3)
    """Range of the masked share."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """An optimizer."""

    milestones: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--drop-epochs",))] = (60, 80)
    """Epochs after which the learning rate drops."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options with required ones of three kinds."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = tyro.MISSING
    """Folders."""
    test_data: str = tyro.MISSING
    """Data."""
    dataset: Literal["voc", "coco"] = tyro.MISSING
    """Dataset."""
    epochs: int = 3
    """Epochs."""
    limit: int | None = None
    """Limit."""
    recipe: Recipe = field(default_factory=Recipe)
    optim: Annotated[Optim, tyro.conf.arg(name="")] = field(default_factory=Optim)


RECIPES = {"mean": Recipe("mean"), "blur": Recipe("blur")}


def parse_line(line: str) -> Options:
    shown = {"config": ("FILE", "YAML file of options.")}
    return parse(Options, line.split(), named={"recipe": RECIPES}, shown=shown)


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schemas.cli.get_program_name", lambda subcommand: "a-command")


def test_options_are_parsed() -> None:
    options = parse_line("a b --test_data d --dataset=voc --recipe mean --recipe.ratio 0 1")
    assert options == Options(
        runs=("a", "b"), test_data="d", dataset="voc", recipe=Recipe("mean", (0.0, 1.0))
    )
    assert parse_line("a --test-data d --dataset coco --drop-epochs 5").optim.milestones == (5,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "missing RUNS, --test-data, --dataset"),
        ("a --dataset voc", "missing --test-data"),
        (
            "a --dataset voc --test-data d --recpie hp",
            "unknown option --recpie (did you mean --recipe?)",
        ),
        (
            "a --dataset voc --test-data d --recipe.fil=x --epoch 3",
            "unknown option --recipe.fil (did you mean --recipe.fill?), unknown option --epoch "
            "(did you mean --epochs?)",
        ),
        (
            "a --dataset voc --test-data d --drop-epoch 1",
            "--drop-epoch (did you mean --drop-epochs?)",
        ),
        ("a --dataset voc --bogus", "unknown option --bogus; missing --test-data"),
        ("a --dataset voc --bogus=3 --test-data d", "unknown option --bogus"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_line(line)
    assert str(raised.value).startswith("a-command: ")
    assert str(raised.value).endswith(f"{message}; see a-command --help")
    assert capsys.readouterr() == ("", "")


def test_an_unexpected_argument_is_named() -> None:
    @dataclass(frozen=True)
    class Plain:
        """Options."""

        seed: int = 0

    with pytest.raises(UserError, match=r"^a-command: unexpected argument x ''; see a-command --h"):
        parse(Plain, ["x", ""])


def test_the_exit_status_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(lambda: parse_line("--bogus") and None)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("line", ["--help", "--recipe mean --help"])
def test_help_lists_the_options_that_choose_by_name(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_line(line)
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--config FILE YAML file of options." in text
    assert "--recipe NAME Name of the recipe: mean, blur." in text
    assert (
        f"--recipe.fill STR Fill of masked cells. (default: {'mean' if 'mean' in line else 'none'})"
        in text
    )
    assert "--test-data STR Data. (required)" in text


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs abc", "--epochs: invalid literal for int() with base 10: 'abc'"),
        ("--limit 1.5", "--limit: no type matching {None}|INT could be instantiated from ['1.5']"),
        (
            "--recipe.ratio 0 x",
            "--recipe.ratio: Could not parse arguments ['0', 'x'] into tuple type "
            "typing.Tuple[float, float]",
        ),
        (
            "--dataset vco",
            "invalid choice 'vco' for argument '--dataset'. Expected one of ('voc', 'coco')",
        ),
        ("--recipe", "missing value for argument '--recipe'. Expected 1 values"),
        ("--epochs --limit 3", "missing value for argument '--epochs'. Expected 1 values"),
    ],
)
def test_a_wrong_value_is_one_line(
    line: str,
    message: str,
    is_terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)  # tyro's box is colored then
    with pytest.raises(UserError) as raised:
        parse_line(f"a --test-data d {line}")
    assert str(raised.value) == f"a-command: {message}; see a-command --help"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_long_wrong_value_is_quoted_as_it_is(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The box of the parser breaks it at the width of the terminal."""
    monkeypatch.setenv("COLUMNS", columns)
    path = f"/scratch/{'long_name/' * 12}of---a---file"
    for value in (path, f"{path} --- and more"):
        with pytest.raises(UserError) as raised:
            parse(Options, ["a", "--test-data", "d", "--dataset", "voc", "--epochs", value])
        assert f"with base 10: '{value}'; see a-command --help" in str(raised.value)
    assert os.environ["COLUMNS"] == columns


def test_another_complaint_of_the_parser_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Unsupported:
        """Options, one of which cannot be given on a command line."""

        thing: Iterator = field(default_factory=lambda: iter(()))

    with pytest.raises(SystemExit):
        parse(Unsupported, ["--thing", "3"])
    assert "Fixed argument" in capsys.readouterr().err


@dataclass(frozen=True)
class Files:
    """Options that are files of this machine."""

    out: Path = Path("preview.png")
    """File to write."""
    record: Path | None = None
    """File to append to."""


def test_paths_are_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(Files, []) == Files()
    assert parse(Files, ["--out", "a b", "--record=c:d"]) == Files(Path("a b"), Path("c:d"))
    with pytest.raises(SystemExit):
        parse(Files, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--out PATH File to write. (default: preview.png)" in text
    assert "--record PATH File to append to. (default: None)" in text


@pytest.mark.parametrize("option", ["--out", "--record"])
@pytest.mark.parametrize("url", ["s3://bucket/a.png", "memory://a", "file:///tmp/a"])
def test_a_url_is_no_path(option: str, url: str) -> None:
    """pathlib would make `s3:/bucket/a.png` of it, in the current folder."""
    with pytest.raises(UserError) as raised:
        parse(Files, [option, url])
    assert str(raised.value) == (
        f"a-command: {option}: {url} must be a path of this machine; only datasets may be URLs; "
        "see a-command --help"
    )
