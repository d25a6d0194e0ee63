"""Test commands in a folder whose own files have the names of the project's packages.

Also test that a user's files are loaded by their path.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from ray import cloudpickle

import saliency_shards
from pipeline import Recipe, fills, masks
from pipeline.registry import find
from precompute.estimators import FunctionOptions
from precompute.sources import open_source
from schemas import UserError
from schemas.cli import import_object, list_loaded_files, load_file, make_absolute
from train.__main__ import parse_command_line
from train.config_io import dump_config, load_config
from train.methods import find_method, get_method_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("schemas", "precompute", "pipeline", "train")

MINE = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import numpy as np
from pipeline.masks import mask
from precompute.sources import Source, SourceImage, key_of
from train.methods import MethodConfig
import neighbor

class Listed(Source):
    classes = ["a"]
    def __init__(self, root, split, download):
        self.folder = Path(root)
    def images(self):
        yield SourceImage(key_of("x.jpg"), "x.jpg", 0)
    def read(self, image):
        return b"bytes of " + image.location.encode()

def center(images):
    return np.ones((len(images), 7, 7)) * np.arange(7)

@mask("edge_of_a_test")
def edge(saliency, ratio, recipe, draws):
    return saliency > 0

@dataclass(frozen=True, kw_only=True)
class SimSiamConfig(MethodConfig):
    name: ClassVar[str] = "simsiam"
    width: int = 2048
    def build(self, setup):
        raise NotImplementedError
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    """Make a user's repository the current folder; drop modules loaded from it afterwards."""
    for room in ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text(f"print('the {room} of a user')\n")
    (tmp_path / "train.py").write_text("print('MY OWN')\n")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "neighbor.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.startswith("saliency_shards_file_")]:
        monkeypatch.delitem(sys.modules, name)  # from files of other tests
    before = set(sys.modules)
    yield tmp_path
    masks.MASKS.pop("edge_of_a_test", None)
    for name in set(sys.modules) - before:
        if name == "neighbor" or name.startswith("saliency_shards_file_"):
            del sys.modules[name]


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


# Start as an installed script does, from a folder that does not contain the project.
SCRIPT = (
    f"import sys; sys.path.append({str(ROOT)!r}); import saliency_shards; saliency_shards.shards()"
)


@pytest.mark.parametrize("path", [".", "..", "", f".{os.pathsep}{ROOT}"])
def test_an_installed_command_runs_the_projects_own_rooms(repository, path):
    done = run(SCRIPT, "--help", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stdout
    assert "of a user" not in done.stdout
    # The current folder is on the path of `python -c`.
    assert f"note: {repository / 'train.py'} is passed over" in done.stderr or (
        f"note: {repository / 'train'} is passed over: train is this project's" in done.stderr
    )
    assert len(done.stderr.splitlines()) == len(ROOMS)


def test_a_program_can_put_the_projects_pipeline_before_its_own(repository):
    """Do what docs/troubleshooting.md says about `from pipeline import MaskedViews`."""
    code = "from importlib.util import find_spec; print(find_spec('pipeline').origin)"
    path = f".{os.pathsep}{ROOT}"
    assert run(code, PYTHONPATH=path).stdout == f"{repository}/pipeline/__init__.py\n"
    first = "import saliency_shards; saliency_shards.own_rooms_first()"
    done = run(f"{first}; {code}", PYTHONPATH=path)
    assert done.stdout == f"{ROOT}/pipeline/__init__.py\n"
    assert f"note: {repository}/pipeline is passed over: pipeline is this project's" in done.stderr
    failed = run("from pipeline import MaskedViews", PYTHONPATH=path)
    assert "cannot import name 'MaskedViews' from 'pipeline' (" in failed.stderr
    assert f"{repository}/pipeline/__init__.py)" in failed.stderr.replace("./", f"{repository}/")


@pytest.mark.slow
def test_torchrun_starts_the_installed_command_beside_a_users_own_train(repository):
    """Use `--no-python saliency-train`, as the docs do; `-m train` would run the user's file."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(sysconfig.get_path("scripts")) / "saliency-train"
    done = subprocess.run(
        [*torchrun, "--local-addr", "127.0.0.1", "--no-python", script, "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "--recipe.query-ratio" in done.stdout
    assert "MY OWN" not in done.stdout
    assert "the pipeline of a user" not in done.stdout


def test_lines_of_an_installed_command_reach_a_pipe_at_once(repository):
    module = repository / "prints.py"
    module.write_text("import os\ndef start():\n    print('a line')\n    os._exit(0)\n")
    code = SCRIPT.replace("saliency_shards.shards()", "saliency_shards.start('prints')")
    assert run(code).stdout == "a line\n"


def test_rooms_that_are_not_installed_are_nobodys(tmp_path):
    """Expect no message about `bench`, which is not installed: the name is the user's."""
    shutil.copy(ROOT / "saliency_shards.py", tmp_path)
    for room in ROOMS:
        (tmp_path / "elsewhere" / room).mkdir(parents=True)
        (tmp_path / room).mkdir()
    (tmp_path / "elsewhere" / "bench.py").write_text("")
    code = (
        "import sys, saliency_shards; sys.path.append('elsewhere'); import bench; "
        "saliency_shards.own_rooms_first(); print(saliency_shards.ROOMS, bench.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.startswith(str(ROOMS))
    assert "bench" not in done.stderr


def test_the_version_is_told_without_any_import(repository):
    done = run(f"{SCRIPT}; print('no exit')", "--version", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("saliency-shards ")
    assert len(done.stdout.splitlines()) == 1


def test_what_was_imported_before_is_told_in_one_line(repository):
    done = run(f"import sys; import schemas; {SCRIPT}", "--help")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: schemas is {repository / 'schemas'}, which was imported before this command, and "
        f"not {ROOT / 'schemas'}; start it without that on PYTHONPATH\n"
    )


def test_the_own_folder_is_first_for_workers_too(repository, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}elsewhere")
    monkeypatch.setattr(sys, "path", [".", "", *sys.path])
    saliency_shards.own_rooms_first()
    assert sys.path[0] == str(ROOT)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(ROOT), ".", "elsewhere"]
    path = list(sys.path)
    saliency_shards.own_rooms_first()
    assert sys.path == path, "once more changes nothing"
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    saliency_shards.own_rooms_first()
    assert capsys.readouterr().err == "", "one rank speaks"


def test_python_m_puts_its_folder_first_and_an_import_does_not(repository, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(repository), *sys.path])
    for arguments, orig, first in [
        (["program.py"], ["python", "program.py"], str(repository)),
        (["-m"], ["python", "-m", "theirs"], str(repository)),
        (["-m"], ["python", "-m", "train.evaluate", "knn"], str(ROOT)),
    ]:
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "orig_argv", orig)
        saliency_shards.own_rooms_first_under_m()
        assert sys.path[0] == first


def test_a_foreign_module_of_no_file_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bench", ModuleType("bench"))
    with pytest.raises(SystemExit) as stop:
        saliency_shards.own_rooms_first()
    assert stop.value.code == 2
    assert "error: bench is of no file" in capsys.readouterr().err


@pytest.mark.slow
def test_things_of_a_file_are_found_in_any_spelling(repository):
    kinds = ("./mine.py", "mine.py", str(repository / "mine.py"), "photos/../mine.py")
    (repository / "photos").mkdir()
    assert len({id(import_object("method", f"{path}:SimSiamConfig")) for path in kinds}) == 1
    assert find("mask", "./mine.py:edge", masks.MASKS) is masks.MASKS["edge_of_a_test"]
    with pytest.raises(
        UserError, match=r"'./mine.py:egde': ./mine.py defines no egde; did you mean edge"
    ):
        find("mask", "./mine.py:egde", masks.MASKS)
    assert find("fill", "mine.py:center", fills.FILLS)([1]).shape == (1, 7, 7)
    assert Recipe(query_mask="./mine.py:edge").query_mask == "./mine.py:edge"
    source = open_source("./mine.py:Listed", "photos", "train", False)
    assert [image.location for image in source.images()] == ["x.jpg"]


def test_a_method_of_a_file_is_an_option_and_comes_back_from_config_yaml(repository, monkeypatch):
    given = parse_command_line(
        ["--data", "d", "--out", "o", "--method", "./mine.py:SimSiamConfig", "--width", "7"]
    )
    assert given.method.width == 7
    assert get_method_name(type(given.method)) == f"{repository / 'mine.py'}:SimSiamConfig"
    (repository / "config.yaml").write_text(dump_config(given, given))
    monkeypatch.chdir(repository / "train")
    assert load_config("../config.yaml").method == given.method
    assert find_method(get_method_name(type(given.method))) is type(given.method)


def test_an_estimator_of_a_file_is_known_by_its_content(repository, monkeypatch):
    estimator = FunctionOptions("./mine.py:center")
    assert estimator.function == f"{repository / 'mine.py'}:center"
    monkeypatch.chdir("/")  # workers have another current folder
    built = estimator.build()
    assert built.maps([np.zeros((3, 3, 3), np.uint8)]).shape == (1, 7, 7)
    assert estimator.parameters() == {"name": "function", "function": "mine.py:center"}
    assert FunctionOptions("a.b:c").parameters() == {"name": "function", "function": "a.b:c"}


def test_a_source_of_a_file_reaches_a_process_that_has_no_such_file(repository):
    source = open_source("./mine.py:Listed", "photos", "train", False)
    for module in list_loaded_files():
        cloudpickle.register_pickle_by_value(module)
    content = cloudpickle.dumps(source)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ray import cloudpickle; "
        "source = cloudpickle.loads(sys.stdin.buffer.read()); print(source.read(*source.images()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=content, capture_output=True, check=False, cwd="/"
    )
    assert done.stdout == b"b'bytes of x.jpg'\n", done.stderr


def test_a_file_that_is_a_module_already_is_not_run_again(repository):
    sys.path.insert(0, str(repository))
    import neighbor

    assert load_file("neighbor.py") is neighbor
    assert list_loaded_files() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("./absent.py:X", None, "No such file"),
        ("./mine.py:Absent", None, "mine.py defines no Absent"),
        ("./mine.py:", None, "write ./mine.py:NAME"),
        ("./broken.py:X", "def f(:\n", r"not valid Python \(.*broken\.py, line 1: invalid syntax"),
        ("./zero.py:X", "\0", r"source code .*null bytes"),
        ("./folder.py:X", ..., "Is a directory"),
        ("./needs.py:X", "import a_module_that_is_absent", "No module named 'a_module_that"),
        ("./text/file:X", None, "its name must end in .py"),
        ("./mine.py", None, r"add the name of the object in it, \./mine\.py:NAME"),
        ("./mine.py:Listed", None, "is no subclass of train.methods.MethodConfig"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(repository, name, content, message):
    file = repository / name.split(":")[0]
    if content is ...:
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        find_method(name)
    assert "\n" not in str(raised.value)
    assert all("_mine_" in module.__name__ for module in list_loaded_files()), (
        "half a module is left"
    )


def test_only_files_are_made_absolute():
    assert make_absolute("a.b:c") == "a.b:c"
    assert make_absolute("./a.py:c") == f"{Path.cwd() / 'a.py'}:c"
