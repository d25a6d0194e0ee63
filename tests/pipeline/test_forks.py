"""A process that is forked while a loader iterates has none of the loader's threads."""

from pathlib import Path

import pytest

from schemas import ShardDataset
from tests.forked import run_forked
from tests.pipeline.conftest import SAMPLES

FORK = """
import atexit, gc, os, signal, sys
from pipeline import EvalViews, MaskedViews
from schemas import UserError
from tests.pipeline.conftest import small

if sys.argv[2] == "MaskedViews":
    views = MaskedViews(sys.argv[1], small("mean"), 8, "cpu")
else:
    views = EvalViews(sys.argv[1], 8, "cpu", crop_size=56)
batches = iter(views)
first = next(batches)
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, 1 + len(list(batches)), flush=True)
    sys.exit()
signal.alarm(60)  # ends it if it hangs
if sys.argv[3] == "iterates":
    try:
        next(batches)
    except UserError as error:
        print(error, flush=True)
    print(len(list(views)), flush=True)
del batches, first, views
gc.collect()
atexit._run_exitfuncs()  # as a script of its own would
"""


@pytest.mark.parametrize("iterates", ["iterates", "collects"])
@pytest.mark.parametrize("name", ["MaskedViews", "EvalViews"])
def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent(
    name: str, iterates: str, dataset: ShardDataset, tmp_path: Path
) -> None:
    """It is told to iterate again, and it ends."""
    process = run_forked(FORK, [str(dataset.url), name, iterates], tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    *lines, last = process.stdout.splitlines()
    steps = SAMPLES // 8 if name == "MaskedViews" else -(-SAMPLES // 8)
    assert last == f"0 {steps}"
    if iterates == "iterates":
        message, again = lines
        assert message == (
            f"{dataset.url}: this process was forked while a loader was iterating; iterate it "
            "again here"
        )
        assert int(again) == steps - (name == "MaskedViews")
    else:
        assert lines == []
