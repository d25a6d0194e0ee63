"""README and docs name what exists: links, make targets, modules, options, presets, recipes."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from pipeline.recipes import RECIPES
from schemas.cli import parse
from train.__main__ import parse_command_line
from train.config import TrainConfig
from train.methods import METHODS
from train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """The shell commands of a page, one string each."""
    found = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    lines = "\n".join(found).replace("\\\n", " ").splitlines()
    return [line.split(" # ")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_are_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        text = (page.parent / target if target else page).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in slugs, (target, anchor)


def test_commands_name_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for page in PAGES:
        for line in blocks(page):
            if line.startswith("make "):
                assert line.split()[1] in targets, line
            for module in re.findall(r"-m ([\w.]+)", line):
                assert importlib.util.find_spec(module) is not None, line


def test_training_commands_are_understood():
    """Every `-m train` of the pages parses, whatever its URLs are."""
    seen = 0
    for page in PAGES:
        for line in blocks(page):
            match = re.search(r"-m train (--.*)$", line)
            if match and "mine.py:" not in line:  # tests.test_documented runs that one
                arguments = [a for a in match[1].split() if a != "..."]
                assert isinstance(parse_command_line(arguments), TrainConfig), line
                seen += 1
    assert seen >= 3


def test_tables_list_all_there_is():
    train, pipeline = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("train", "pipeline"))
    for name in METHODS:
        assert f"| `{name}` |" in train
    for name in PRESETS:
        assert f"| `{name}` |" in train
    for name in RECIPES:
        assert f"| `{name}` |" in pipeline


def test_version_is_told(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Options:
        """Nothing."""

    monkeypatch.setattr(sys, "argv", ["train", "--version"])
    with pytest.raises(SystemExit) as stop:
        parse(Options)
    assert stop.value.code == 0
    assert re.fullmatch(r"saliency-shards \d+\.\d+\.\d+\n", capsys.readouterr().out)
