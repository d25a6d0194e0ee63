"""Check the project's rules: which package may import which, and how large a file may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"schemas", "precompute", "pipeline", "train", "bench"}
# The packages that each package may import, and the heavy ones it must do without.
MAY_IMPORT = {
    "schemas": set(),
    "precompute": {"schemas"},
    "pipeline": {"schemas"},
    "train": {"schemas", "pipeline"},
    "bench": {"schemas", "precompute", "pipeline", "train"},
}
MAY_NOT_NEED = {
    "schemas": {"cv2", "torch", "torchvision", "nvidia", "ray"},
    "precompute": set(),
    "pipeline": {"ray"},
    "train": {"ray"},
    "bench": set(),
}
RUNS_NETWORKS: dict[str, set[str]] = {
    "schemas/precision.py": {"torch"},
    "schemas/timm_networks.py": set(),
}
"""Files that only rooms which run networks import, and what they may need all the same."""
MAX_LINES = 400


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it: modules, and their members."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it means"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def imported(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, anywhere in it."""
    return {module.split(".")[0] for module in imported_modules(path)}


def test_imported_sees_what_a_file_imports(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("import ray.data as r\nfrom train import x\ndef f():\n    import torch\n")
    assert imported(file) == {"ray", "train", "torch"}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_follow_the_flow_of_data(room: str) -> None:
    assert sources(room), f"{room} is empty"
    for path in sources(room):
        found = imported(path)
        others = (found & ROOMS) - {room} - MAY_IMPORT[room]
        assert not others, f"{path.relative_to(ROOT)} imports {sorted(others)}"
        allowed = RUNS_NETWORKS.get(str(path.relative_to(ROOT)), set())
        heavy = (found & MAY_NOT_NEED[room]) - allowed
        assert not heavy, f"{path.relative_to(ROOT)} needs {sorted(heavy)}"


def test_nothing_that_reads_shards_imports_what_runs_networks() -> None:
    networks = {name.removesuffix(".py").replace("/", ".") for name in RUNS_NETWORKS}
    for path in sources("schemas"):
        for module in imported_modules(path):
            assert not any(module.startswith(name) for name in networks), path


def test_evaluations_import_the_trainer_and_never_the_other_way_round() -> None:
    evaluations = sources("train/evaluate")
    assert any("train.trainer.train_job" in imported_modules(path) for path in evaluations)
    for path in set(sources("train")) - set(evaluations):
        wrong = {name for name in imported_modules(path) if name.startswith("train.evaluate")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_file_outgrows_its_room(room: str) -> None:
    for path in sources(room):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines; is it two rooms?"
