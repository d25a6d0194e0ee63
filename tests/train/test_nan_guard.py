"""A gradient that is not finite beside a finite loss."""

import pytest
import torch

import train.trainer
from schemas import UserError
from tests.train.runs import config
from train.methods import MoCo


@pytest.mark.parametrize("step", [2, 3])  # inside the run, and the last one
def test_a_bad_gradient_stops_the_run_before_its_update(shards, tmp_path, monkeypatch, step):
    """The slope of a square root at zero is infinite; the loss does not show it."""
    forward, calls = MoCo.forward, []

    def with_root(self, batch):
        scalars = forward(self, batch)
        calls.append(scalars)
        if len(calls) == step:
            loss = scalars["loss"]
            scalars["loss"] = loss + (loss - loss.detach()).abs().sqrt()
        return scalars

    monkeypatch.setattr(MoCo, "forward", with_root)
    with pytest.raises(UserError, match=rf"^the gradient of step {step} is nan; the keys of its "):
        train.trainer.train(config(shards, tmp_path, epochs=1, log_steps=1))
    assert not list(tmp_path.glob("encoder.safetensors"))
    assert not list(tmp_path.glob("checkpoints/step-*"))
    folder = tmp_path / "failed" / f"step-{step:08d}"
    state = torch.load(folder / "state.pt", weights_only=True)
    assert (state["step"], state["after_step"]) == (step, step - 1)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert len(torch.load(folder / "rank-0000.pt", weights_only=True)["keys"]) == 8
