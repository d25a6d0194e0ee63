"""The supervised loss against NumPy, and the labels that it needs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from schemas import UserError
from tests.train import oracle
from tests.train.ranks import random_batch
from train.methods import Setup, SupervisedConfig


def test_loss_and_accuracy_equal_the_formula():
    """A share of 0.3 of each target is spread over all three classes, the right one included."""
    torch.manual_seed(0)
    method = SupervisedConfig(label_smoothing=0.3).build(
        Setup(encoder="tiny", batch_size=32, classes=3)
    )
    drawn = random_batch(32, 0)
    batch = SimpleNamespace(query=drawn.query, label=drawn.label)  # it reads no key
    weights = {name: value.double().numpy() for name, value in method.state_dict().items()}
    logits = oracle.features(batch.query, weights) @ weights["classifier.weight"].T
    logits += weights["classifier.bias"]
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    labels = batch.label.numpy()
    targets = 0.7 * np.eye(3)[labels] + 0.3 / 3

    scalars = method(batch)
    assert scalars["loss"].item() == pytest.approx(-(targets * log_shares).sum(axis=1).mean())
    assert scalars["accuracy"].item() == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert not scalars["accuracy"].requires_grad
    assert method.exported() is method.encoder
    with torch.autocast("cpu", torch.bfloat16):  # the loss keeps its digits
        assert method(batch)["loss"].dtype == torch.float32


@pytest.mark.parametrize("classes", [0, 1])
def test_fewer_than_two_classes_are_refused(classes):
    with pytest.raises(UserError, match=f"have {classes} classes; it needs labels of at least 2"):
        SupervisedConfig().build(Setup(encoder="tiny", batch_size=4, classes=classes))
