"""Install the wheel in a clean environment: `schemas` needs neither torch nor DALI nor Ray."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).parent / "uv"

PROGRAM = """
import sys
from schemas import ShardDataset, write_dataset
heavy = {"cv2", "torch", "nvidia", "ray", "torchvision"} & set(sys.modules)
assert not heavy, heavy
for name in ("torch", "nvidia.dali", "ray"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is installed")
dataset = ShardDataset.open(sys.argv[1])
print(len(list(dataset)), dataset.verify().problems)
"""


def uv(*arguments: object, folder: Path) -> None:
    done = subprocess.run(
        [UV, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=folder
    )
    if "error sending request" in done.stderr or "dns error" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_alone_reads_shards(tmp_path, make_sample):
    from schemas import write_dataset

    data = tmp_path / "data"
    write_dataset(str(data), [make_sample(i) for i in range(5)], name="t", classes=["a", "b", "c"])
    source = tmp_path / "source"  # a build leaves files in its folder
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "out", "build", "tests"))
    uv("build", "--wheel", "--out-dir", tmp_path / "dist", source, folder=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("schemas", "precompute", "pipeline", "train"):
        assert f"{package}/py.typed" in names
    assert not [name for name in names if name.startswith(("bench/", "tests/", "examples/"))]
    assert [name for name in names if name.endswith("dist-info/licenses/LICENSE")]
    uv("venv", "--python", sys.executable, tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    uv("pip", "install", "--python", python, wheel, folder=tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [python, tmp_path / "program.py", data], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "[]"]
