"""What a run says about itself."""

import pytest

from train import run_info

PYTHON = "/venv/bin/python"


@pytest.mark.parametrize(
    ("ranks", "local", "argv", "command"),
    [
        (1, 1, [PYTHON, "-m", "train", "--out", "a b"], "python -m train --out 'a b'"),
        (1, 1, [PYTHON, "bin/saliency-train", "--x"], f"{PYTHON} bin/saliency-train --x"),
        (8, 8, [PYTHON, "-u", "-m", "train", "--x"], "torchrun --nproc-per-node 8 -m train --x"),
        (
            16, 8, [PYTHON, "bin/saliency-train", "--x"],
            "torchrun --nnodes 2 --nproc-per-node 8 --no-python bin/saliency-train --x",
        ),
        (2, 2, [PYTHON, "-u", "own.py", "--x"], "torchrun --nproc-per-node 2 own.py --x"),
    ],
)  # fmt: skip
def test_the_command_of_a_run_repeats_it(ranks, local, argv, command, monkeypatch):
    monkeypatch.setattr(run_info, "world_size", lambda: ranks)
    monkeypatch.setattr("sys.orig_argv", argv)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert run_info.reconstruct_command() == command
