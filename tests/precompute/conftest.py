import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from precompute.__main__ import main
from precompute.cluster import cluster


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A Ray that the jobs of this process use one after the other: starting one takes seconds."""
    with cluster(None):
        yield


def run_here(*arguments: object) -> int:
    """The command in this process: its imports, seconds long, are paid once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["precompute", *map(str, arguments)])
        return main()


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file but the one that says how long the run took."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "stats.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
