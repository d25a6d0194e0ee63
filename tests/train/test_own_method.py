"""A method of a file outside this project, which may be edited between two starts."""

from dataclasses import replace

import pytest
import torch

import train.trainer
from schemas import UserError
from tests.train.runs import config
from train.methods import MoCoConfig, digest_method, find_method

MINE = """
from dataclasses import dataclass
from train.methods import MoCoConfig

@dataclass(frozen=True, kw_only=True)
class Mine(MoCoConfig):
    version = "{}"
"""


def find(folder, name, text):
    """Write a file and return its class; each file has a name of its own, as it is loaded once."""
    file = folder / name
    file.write_text(MINE.format(text))
    return find_method(f"{file}:Mine")(queue=20)


def test_a_file_that_changed_since_the_checkpoint_is_refused(shards, tmp_path):
    out = tmp_path / "run"
    first, same, edited = (
        find(tmp_path, f"{name}.py", text) for name, text in (("a", "x"), ("b", "x"), ("c", "y"))
    )
    options = config(shards, out, method=first, epochs=1)
    train.trainer.train(options)
    train.trainer.train(replace(options, method=same))
    with pytest.raises(UserError, match=r"made with other settings: code\.method was \w+, is \w+"):
        train.trainer.train(replace(options, method=edited))

    (path,) = out.glob("checkpoints/step-*/state.pt")
    state = torch.load(path, weights_only=True)
    del state["settings"]["code.method"]  # an older checkpoint does not have it
    torch.save(state, path)
    train.trainer.train(replace(options, method=edited))


def test_a_file_may_be_edited_while_it_trains(shards, tmp_path, monkeypatch):
    method = find(tmp_path, "d.py", "x")

    def edit(*_):
        (tmp_path / "d.py").write_text(MINE.format("y"))

    monkeypatch.setattr(train.trainer.Trainer, "log_views", edit)
    options = config(shards, tmp_path / "run", method=method, epochs=1)
    assert train.trainer.train(options).exists()
    with pytest.raises(UserError, match="the file has changed since this process loaded it"):
        train.trainer.train(options)


def test_only_methods_of_other_files_have_a_digest():
    class Local(MoCoConfig):
        pass

    assert digest_method(MoCoConfig()) == {}
    assert list(digest_method(Local())) == ["code.method"]
    Local.__module__ = "__main__"
    assert digest_method(Local()) == {}
