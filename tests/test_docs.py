"""Check that README and docs name what exists: links, files, make targets, options, messages."""

import ast
import dataclasses
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.recipes import RECIPES
from schemas.cli import parse, run_subcommand
from train.__main__ import parse_command_line
from train.config import TrainConfig
from train.methods import METHODS
from train.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("schemas", "precompute", "pipeline", "train", "bench")
MAX_LINES = 200
MAX_PARAGRAPH = 6


def blocks(page: Path) -> list[str]:
    """Return the shell commands of a page, one string each."""
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
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for page in PAGES:
        for line in blocks(page):
            if line.startswith("make "):
                assert line.split()[1] in targets, line
            if command := re.match(r"saliency-\w+", line):
                assert command[0] in scripts, line
            for module in re.findall(r"-m ([\w.]+)", line):
                assert importlib.util.find_spec(module) is not None, line


def test_training_commands_are_understood():
    """Parse every training command of the pages, whatever its URLs are."""
    seen = 0
    for page in PAGES:
        for line in blocks(page):
            match = re.search(r"(?:-m train|saliency-train) (--.*)$", line)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_and_paragraphs_are_short(page):
    text = page.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    prose = re.sub(r"```.*?```", "\n\n", text, flags=re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        lines = [line for line in paragraph.strip().splitlines() if not line.startswith("|")]
        starts = sum(bool(re.match(r"- |\d+\. ", line)) for line in lines)
        assert len(lines) <= MAX_PARAGRAPH * max(1, starts), paragraph


def test_files_that_pages_name_exist():
    folders = "|".join([*PACKAGES, "examples", "docs", "tests"])
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), (page.name, name)


def test_contributing_names_the_registries():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for row in re.findall(
        r"^\| (?:fill|mask|recipe|estimator|source|method|preset) \|.*$", text, re.M
    ):
        name = re.search(r"`([A-Z]{4,})`", row)
        assert name is not None, row
        files = [
            ROOT / file
            for file in re.findall(r"`((?:pipeline|precompute|train)/[\w/.]+\.py)`", row)
        ]
        assert any(re.search(rf"^{name[1]}\b", file.read_text(), re.M) for file in files), row


def test_references_in_the_code_resolve():
    """Check that every D-number is a row of docs/method.md; no reference leaves the project."""
    rows = set(re.findall(r"^\| (D\d+) \|", (ROOT / "docs/method.md").read_text(), re.M))
    seen = set()
    for path in [
        path for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")
    ]:
        if path == Path(__file__):
            continue
        text = path.read_text()
        seen |= (numbers := set(re.findall(r"\bD[1-9]\d?\b", text)))
        assert numbers <= rows, (path, numbers - rows)
        for elsewhere in (r"methods\.md", r"\bmethods (?:table|\d)", r"\b[Ss]ection \d", "DESIGN"):
            assert not re.search(elsewhere, text), (path, elsewhere)
    assert {"D1", "D15"} <= seen


def strings_of_the_code() -> list[str]:
    """Return every string in the code as it is written there; a value in it becomes "\\0"."""
    texts = []
    for path in [
        ROOT / "saliency_shards.py",
        *(p for x in PACKAGES for p in (ROOT / x).rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "\0" for x in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_messages_name_installed_commands():
    """Whoever installs by pip knows only these; `python -m` may find packages of the user."""
    pages = [page.read_text() for page in PAGES]
    for text in [*strings_of_the_code(), *pages]:
        assert not re.search(
            r"`python -m (?:schemas|precompute|pipeline|train|train\.evaluate|train\.report) ", text
        ), text


def quoted_as(message: str) -> re.Pattern[str]:
    """Return the pattern that a string of the code matches if it is this documented message."""
    parts = re.split(r"\.\.\.|\bHOST:PORT\b|\bFILE\b|\bN\b", message)
    return re.compile(".*".join(map(re.escape, parts)), re.S)


def test_messages_are_quoted_as_the_code_has_them():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    own = page.partition("## Messages of this project")[2].partition("\n## ")[0]
    messages = [
        message
        for row in re.findall(r"^\| (`.*?) \|", own, re.M)
        for message in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) > 20
    texts = strings_of_the_code()
    for message in messages:
        assert any(quoted_as(message).search(text) for text in texts), message
    assert not quoted_as("rank N of N is asleep").search("rank \0 of \0 is awake")


def test_the_citation_file_names_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "references"} <= citation.keys()
    for paper in citation["references"]:
        assert {"type", "title", "authors", "year"} <= paper.keys(), paper["title"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == citation["license"] == "Apache-2.0"


def test_version_is_told(monkeypatch, capsys):
    @dataclasses.dataclass(frozen=True)
    class Options:
        """Nothing."""

    monkeypatch.setattr(sys, "argv", ["train", "--version"])
    with pytest.raises(SystemExit) as stop:
        parse(Options)
    assert stop.value.code == 0
    line = capsys.readouterr().out
    assert re.fullmatch(r"saliency-shards \d+\.\d+\.\d+\n", line)
    monkeypatch.setattr(sys, "argv", ["pipeline", "--version"])
    assert run_subcommand({}, "Commands.") is None
    assert capsys.readouterr().out == line
