"""A gradient that is not finite beside a finite loss."""

import re

import pytest
import torch

import train.trainer
from schemas import UserError
from tests.train.runs import config
from train.data import BatchStream
from train.methods import MoCo


def break_gradient(step, monkeypatch):
    """Make the gradient of a step infinite: the slope of a square root at zero is."""
    forward, calls = MoCo.forward, []

    def with_root(self, batch):
        scalars = forward(self, batch)
        calls.append(scalars)
        if len(calls) == step:
            loss = scalars["loss"]
            scalars["loss"] = loss + (loss - loss.detach()).abs().sqrt()
        return scalars

    monkeypatch.setattr(MoCo, "forward", with_root)


@pytest.mark.parametrize("step", [2, 3])  # inside the run, and the last one
def test_a_bad_gradient_stops_the_run_before_its_update(shards, tmp_path, monkeypatch, step):
    break_gradient(step, monkeypatch)
    with pytest.raises(UserError, match=rf"^the gradient of step {step} is nan; the keys of its "):
        train.trainer.train(config(shards, tmp_path, epochs=1, log_steps=1))
    assert not list(tmp_path.glob("encoder.safetensors"))
    assert not list(tmp_path.glob("checkpoints/step-*"))
    folder = tmp_path / "failed" / f"step-{step:08d}"
    state = torch.load(folder / "state.pt", weights_only=True)
    assert (state["step"], state["after_step"]) == (step, step - 1)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert len(torch.load(folder / "rank-0000.pt", weights_only=True)["keys"]) == 8


def test_a_bad_gradient_between_two_checks_is_named_by_its_own_step(shards, tmp_path, monkeypatch):
    """The losses of the steps after it are bad too."""
    keys = []
    next_micro_batches = BatchStream.next_micro_batches

    def note_keys(self, count):
        for batch in next_micro_batches(self, count):
            keys.append(batch.sample_keys)
            yield batch

    monkeypatch.setattr(BatchStream, "next_micro_batches", note_keys)
    break_gradient(2, monkeypatch)
    message = r"^the gradient of step 2 is nan; .*--log-steps 1 stops right at step 2\)$"
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        train.trainer.train(config(shards, tmp_path, epochs=2, log_steps=100))
    folder = tmp_path / "failed" / "step-00000002"
    assert torch.load(folder / "rank-0000.pt", weights_only=True)["keys"] == keys[1]
    assert torch.load(folder / "state.pt", weights_only=True)["after_step"] == 2
